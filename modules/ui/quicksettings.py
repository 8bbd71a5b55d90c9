"""The row above the tabs: preset, checkpoint, VAE and text encoder files, clip skip.

A choice here is a setting: it is saved, and takes effect with the next job.
Must not know the tabs: it returns start values, and modules/ui/tabs.py passes them to the controls.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from backend.foreign_json import parse_resolution
from modules.checkpoints.families import FamilyFacts, facts_of, families_are_imported
from modules.checkpoints.listing import CHECKPOINT_SUFFIXES, CheckpointInfo
from modules.errors import RequestError
from modules.settings.low_bits import LOW_BITS
from modules.settings.presets import ALL, NAMES
from modules.ui.components import DropdownMulti, ToolButton
from modules.ui.sections import MAX_SIDE_PX, MIN_SIDE_PX, SIDE_STEP_PX, USUAL_STEPS, Defaults

if TYPE_CHECKING:
    from modules.application import Application

log = logging.getLogger(__name__)

PRESETS = (*NAMES, ALL)
_WITH_VALUES = NAMES
NATIVE_SIZE_KEY = "modelspec.resolution"


@dataclass(frozen=True, kw_only=True)
class QuickSettings:
    """The row's controls. `notice` says what to do without a checkpoint; `watch` polls for one until there is one."""

    preset: gr.Radio
    checkpoint: gr.Dropdown
    refresh: gr.Button
    modules: gr.Dropdown
    low_bits: gr.Dropdown
    clip_skip: gr.Slider
    notice: gr.HTML
    watch: gr.Timer


def create_quicksettings(app: Application) -> QuickSettings:
    """Build the row inside the current gradio context."""
    options = app.options
    preset = start_preset(app)
    with gr.Row(elem_id="quicksettings", variant="compact"):
        radio = gr.Radio(label="UI", choices=list(PRESETS), value=preset, elem_id="forge_ui_preset")
        checkpoint = gr.Dropdown(
            label="Checkpoint",
            elem_id="setting_sd_model_checkpoint",
            elem_classes=["model_selection"],
            allow_custom_value=True,
            **checkpoint_dropdown(app),
        )
        refresh = ToolButton(icon_name="refresh", elem_id="forge_refresh_checkpoint")
        modules = DropdownMulti(
            label="VAE / Text Encoder", elem_id="setting_forge_additional_modules", allow_custom_value=True, **modules_dropdown(app)
        )
        low_bits = gr.Dropdown(
            label="Diffusion in Low Bits",
            choices=list(LOW_BITS),
            value=options.forge_unet_storage_dtype if options.forge_unet_storage_dtype in LOW_BITS else LOW_BITS[0],
            elem_id="setting_forge_unet_storage_dtype",
            visible=low_bits_are_shown(preset),
        )
        clip_skip = gr.Slider(
            buttons=[],
            label="Clip skip",
            minimum=1,
            maximum=12,
            step=1,
            precision=0,
            value=options.CLIP_stop_at_last_layers,
            elem_id="setting_CLIP_stop_at_last_layers",
            visible=clip_skip_is_shown(preset),
        )
    notice = gr.HTML(notice_html(app), elem_id="no_checkpoint_notice")
    watch = gr.Timer(3, active=len(app.checkpoints) == 0)
    return QuickSettings(
        preset=radio, checkpoint=checkpoint, refresh=refresh, modules=modules, low_bits=low_bits, clip_skip=clip_skip, notice=notice, watch=watch
    )


def start_preset(app: Application) -> str:
    """The preset shown first: xl with --sdxl, else the saved one."""
    if app.config.sdxl:
        return "xl"
    return app.options.forge_preset if app.options.forge_preset in PRESETS else PRESETS[0]


def low_bits_are_shown(preset: str) -> bool:
    return preset != "sd"


def clip_skip_is_shown(preset: str) -> bool:
    return preset in ("sd", ALL)


def distilled_is_shown(preset: str, facts: FamilyFacts | None) -> bool:
    """Whether the sliders of distilled guidance are shown: the checkpoint says, and while it is not known the preset."""
    return preset in ("flux", ALL) if facts is None else facts.takes_distilled


def selected_facts(app: Application) -> FamilyFacts | None:
    """Of the selected checkpoint; None where that is not known without a wait."""
    return facts_of(selected_checkpoint(app)) if families_are_imported() else None


def selected_checkpoint(app: Application) -> CheckpointInfo | None:
    """The checkpoint for the next job; None if there is none."""
    return app.checkpoints.find(app.options.sd_model_checkpoint) or next(iter(app.checkpoints), None)


def checkpoint_dropdown(app: Application) -> dict[str, Any]:
    """Choices and value of the checkpoint dropdown."""
    short = app.options.sd_checkpoint_dropdown_use_short
    selected = selected_checkpoint(app)
    value = None if selected is None else (selected.short_title if short else selected.title)
    return {"choices": app.checkpoints.titles(use_short=short), "value": value}


def modules_dropdown(app: Application) -> dict[str, Any]:
    """Choices and value of the VAE / text encoder field."""
    files = app.additional_modules.files
    chosen = [Path(str(name)).name for name in app.options.forge_additional_modules or []]
    return {"choices": list(files), "value": [name for name in chosen if name in files]}


def notice_html(app: Application) -> str:
    """Where to put a checkpoint, if there is none; else empty."""
    if len(app.checkpoints):
        return ""
    folders = " or ".join(f"<code>{html.escape(str(folder))}</code>" for folder in app.checkpoints.roots)
    kinds = ", ".join(f"<code>{suffix}</code>" for suffix in CHECKPOINT_SUFFIXES)
    return (
        f"<div class='notice'><b>There is no checkpoint yet.</b> Put one ({kinds}; docs/families.md lists the models) into {folders}. "
        "It appears in the list above automatically; no restart needed.</div>"
    )


def parse_native_size(value: Any) -> tuple[int, int] | None:
    """Width and height from a declared resolution such as "64x64" or "1024"; None if it is malformed or the size is not possible."""
    sides = parse_resolution(value)
    if sides is None or not all(MIN_SIDE_PX <= side <= MAX_SIDE_PX and side % SIDE_STEP_PX == 0 for side in sides):
        return None
    return sides


def native_size(app: Application) -> tuple[int, int] | None:
    """Width and height that the selected checkpoint declares; None if it declares none."""
    selected = selected_checkpoint(app)
    return parse_native_size(selected.metadata.get(NATIVE_SIZE_KEY)) if selected is not None else None


def preset_defaults(options: Mapping[str, Any] | Any, preset: str, tab: str, before: str = "") -> Defaults | None:
    """The values that `preset` sets on the tab ("txt2img" or "img2img"); None for "all", which changes nothing.

    A preset without a number of steps takes back that of the preset `before`.
    """
    if preset not in _WITH_VALUES:
        return None
    prefix = f"{preset}_{'t2i' if tab == 'txt2img' else 'i2i'}"
    read = {name: getattr(options, f"{prefix}_{name}") for name in ("width", "height", "cfg", "sampler", "scheduler")}
    is_flux = preset == "flux"
    distilled, hires_distilled = (getattr(options, name) if is_flux else 3.5 for name in (f"{prefix}_d_cfg", "flux_t2i_hr_d_cfg"))
    usual_steps = USUAL_STEPS if _own_steps(options, before, prefix[-3:]) is not None else None
    return Defaults(
        width_px=int(read["width"]),
        height_px=int(read["height"]),
        cfg_scale=float(read["cfg"]),
        hires_cfg_scale=float(getattr(options, f"{preset}_t2i_hr_cfg")),
        sampler=read["sampler"],
        scheduler=read["scheduler"],
        distilled_cfg_scale=float(distilled),
        hires_distilled_cfg_scale=float(hires_distilled),
        steps=_own_steps(options, preset, prefix[-3:]) or usual_steps,
    )


def _own_steps(options: Mapping[str, Any] | Any, preset: str, tab: str) -> int | None:
    """The number of steps that a preset sets on "t2i" or "i2i"; None if it leaves them."""
    steps = getattr(options, f"{preset}_{tab}_step", None)
    return None if steps is None else int(steps)


def family_defaults(facts: FamilyFacts) -> Defaults:
    """What the page proposes for a family that no preset is for."""
    own = facts.defaults
    return Defaults(
        width_px=own.width_px,
        height_px=own.height_px,
        cfg_scale=own.cfg,
        hires_cfg_scale=own.cfg,
        sampler=own.sampler,
        scheduler=own.schedule,
        steps=own.steps,
    )


def fit_variant(defaults: Defaults | None, facts: FamilyFacts | None) -> Defaults | None:
    """A preset's values with those of a checkpoint whose name says that it is another kind of model than the preset is for (a base model)."""
    if defaults is None or facts is None or not facts.is_variant:
        return defaults
    own = facts.defaults
    return replace(defaults, cfg_scale=own.cfg, hires_cfg_scale=own.cfg, steps=own.steps)


def is_other_variant(preset: str, before: FamilyFacts | None, after: FamilyFacts | None) -> bool:
    """Whether a checkpoint of the preset's family followed one of another kind (a base model after a distilled one, or the other way around)."""
    if after is None or after.defaults.preset != preset:
        return False
    return after.is_variant != (before is not None and before.is_variant)


def preset_for(preset: str, facts: FamilyFacts | None) -> str:
    """The preset after a checkpoint of this family was chosen: the family's. Between sd and xl the user chooses."""
    own = "" if facts is None else facts.defaults.preset
    return preset if own not in _WITH_VALUES or preset == ALL or {own, preset} <= {"sd", "xl"} else own


class QuickSettingsHandlers:
    """Handlers of the row's controls. An invalid value is rejected with a message, and the old value is restored."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self._preset = start_preset(app)

    def _keep(self, key: str, value: Any) -> None:
        try:
            if self.app.options.set(key, value):
                self.app.save_options()
        except RequestError as error:
            gr.Warning(str(error))

    def choose_checkpoint(self, title: str | None) -> Any:
        """Save the choice; an unknown name restores the old one."""
        info = self.app.checkpoints.find(title)
        if info is None:
            if title:
                gr.Warning(f"There is no checkpoint {title!r}. Choose one from the list, or press the refresh button if the file is new.")
            return gr.update(**checkpoint_dropdown(self.app))
        self._keep("sd_model_checkpoint", info.title)
        return gr.skip()

    def choose_modules(self, names: Sequence[str] | None) -> Any:
        files = self.app.additional_modules.files
        known = [name for name in names or [] if name in files]
        self._keep("forge_additional_modules", [str(files[name]) for name in known])
        return gr.skip() if len(known) == len(names or []) else gr.update(value=known)

    def choose_low_bits(self, value: str) -> None:
        self._keep("forge_unet_storage_dtype", value)

    def choose_clip_skip(self, value: float) -> None:
        self._keep("CLIP_stop_at_last_layers", int(value))

    def choose_preset(self, preset: str) -> list[Any]:
        """Keep it, and bring back the checkpoint and files that were chosen with it last. Updates for checkpoint, modules, low bits, clip skip."""
        if preset != self._preset:
            self._exchange_choices(self._preset, preset)
        self._keep("forge_preset", preset)
        self._preset = preset
        return [
            gr.update(**checkpoint_dropdown(self.app)),
            gr.update(**modules_dropdown(self.app)),
            gr.update(visible=low_bits_are_shown(preset)),
            gr.update(visible=clip_skip_is_shown(preset)),
        ]

    @property
    def preset(self) -> str:
        """The one that is chosen."""
        return self._preset

    def follow_checkpoint(self, checkpoint_before: str | None) -> str | None:
        """The preset that takes the place of the one before because of the checkpoint that was just chosen; None where it stays."""
        after = preset_for(self._preset, facts_of(selected_checkpoint(self.app)))  # now known, for the controls too
        if after == self._preset:
            return None
        self._remember(self._preset, checkpoint_before)
        self._restore_modules(after)
        self._keep("forge_preset", after)
        self._preset = after
        return after

    def _exchange_choices(self, before: str, after: str) -> None:
        options = self.app.options
        self._remember(before, options.sd_model_checkpoint)
        if after in _WITH_VALUES and (info := self.app.checkpoints.find(getattr(options, f"forge_checkpoint_{after}"))) is not None:
            self._keep("sd_model_checkpoint", info.title)
            self._restore_modules(after)

    def _remember(self, preset: str, checkpoint: str | None) -> None:
        if preset in _WITH_VALUES:
            self._keep(f"forge_checkpoint_{preset}", str(checkpoint or ""))
            self._keep(f"forge_additional_modules_{preset}", list(self.app.options.forge_additional_modules or []))

    def _restore_modules(self, preset: str) -> None:
        """Those that were chosen with the preset last and are still there."""
        if preset in _WITH_VALUES:
            paths = {str(path) for path in self.app.additional_modules.files.values()}
            kept = [str(name) for name in getattr(self.app.options, f"forge_additional_modules_{preset}") or []]
            self._keep("forge_additional_modules", [name for name in kept if name in paths])

    def look_again(self) -> list[Any]:
        """Scan the model folders. Returns checkpoint and module lists, the notice, and whether to keep polling."""
        self.app.checkpoints.refresh()
        self.app.additional_modules.refresh()
        return self.current()

    def current(self) -> list[Any]:
        """Updates with the row's current values, for checkpoint, modules, notice and watch."""
        return [
            gr.update(**checkpoint_dropdown(self.app)),
            gr.update(**modules_dropdown(self.app)),
            notice_html(self.app),
            gr.update(active=len(self.app.checkpoints) == 0),
        ]
