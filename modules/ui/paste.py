"""Puts generation parameters into controls: the paste button, and sending a picture with its parameters to another tab.

Must not know how the text is parsed (modules/infotext/parameters.py) nor how a tab is built: a tab passes its controls by request field.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from modules.infotext import parameters as infotext_utils
from modules.infotext.fields import FIELDS_BY_TAB
from modules.launch.guest_calls import call_guest
from modules.scripts import callbacks
from modules.ui.page_files import picture_of_page
from modules.ui.pnginfo import read_picture
from modules.ui.shown_text import infotext_of, picture_at

if TYPE_CHECKING:
    from modules.application import Application

log = logging.getLogger(__name__)

SEED_FIELDS = frozenset({"seed", "subseed", "subseed_strength", "seed_resize_from_w", "seed_resize_from_h"})
SIZE_FIELDS = frozenset({"width", "height"})
TOLD: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""For handlers that may show a toast: gradio has a way to send one only through its queue."""


@dataclass(frozen=True, kw_only=True)
class PasteTarget:
    """Where parameters go: a tab's controls by request field, its checkbox for the extra seed controls, its override settings field."""

    tab: str
    controls: Mapping[str, Component]
    extra_seeds: Component
    override_settings: gr.Dropdown
    script_fields: Sequence[Any] = ()
    """(control, key or function of the parameters) pairs from scripts."""
    script_keys: frozenset[str] = frozenset()
    """Keys that scripts handle, so that they do not become setting overrides."""


def value_for(control: Component, value: Any) -> Any:
    """`value` converted for this control; None if it cannot be."""
    if isinstance(control, gr.Checkbox):
        return value if isinstance(value, bool) else str(value).strip().lower() in ("true", "1", "yes")
    if isinstance(control, (gr.Slider, gr.Number)):
        return _number_for(control, value)
    if isinstance(control, gr.Dropdown):
        return _choice_for(control, value)
    return str(value)


def _number_for(control: gr.Slider | gr.Number, value: Any) -> float | int | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if not math.isfinite(number):
        return None
    if control.minimum is not None:
        number = max(number, float(control.minimum))
    if control.maximum is not None:
        number = min(number, float(control.maximum))
    return int(number) if number.is_integer() else number


def _choice_for(control: gr.Dropdown, value: Any) -> Any:
    choices = [choice for _, choice in control.choices]
    if control.multiselect:
        wanted = value if isinstance(value, (list, tuple)) else [value]
        return [item for item in wanted if item in choices or control.allow_custom_value]
    same = next((choice for choice in choices if str(choice).lower() == str(value).lower()), None)
    return value if same is None and control.allow_custom_value else same


def control_updates(target: PasteTarget, params: Mapping[str, Any], *, skipped_fields: frozenset[str] = frozenset()) -> list[Any]:
    """One update per control of `target`, in order; controls that `params` does not mention stay unchanged."""
    found = {field.field: field.read(params) for field in FIELDS_BY_TAB[target.tab]}
    return [_update(control, None if name in skipped_fields else found.get(name)) for name, control in target.controls.items()]


def _update(control: Component, value: Any) -> Any:
    if value is None:
        return gr.skip()
    fitting = value_for(control, value)
    return gr.skip() if fitting is None else gr.update(value=fitting)


def subseed_is_used(params: Mapping[str, Any]) -> bool:
    """Whether `params` contain a variation seed or a resized seed."""
    return any(key in params for key in ("Variation seed", "Variation seed strength", "Seed resize from-1", "Seed resize from-2"))


def _read(params: Mapping[str, Any], key: Any) -> Any:
    return key(params) if callable(key) else params.get(key)


class Paster:
    """Parses parameters and fills the controls of one target."""

    def __init__(self, app: Application, target: PasteTarget) -> None:
        self.app = app
        self.target = target

    def outputs(self) -> list[Component]:
        """The controls updated by `updates`, in order."""
        controls = [*self.target.controls.values(), self.target.extra_seeds, self.target.override_settings]
        return [*controls, *(field[0] for field in self.target.script_fields)]

    def updates(self, text: str, *, sent: bool = False) -> list[Any]:
        """Updates from the parameters in `text`. `sent`: they arrive with a picture, so the options decide whether size and seed are included."""
        if not text.strip():
            return [gr.skip() for _ in self.outputs()]
        params = dict(infotext_utils.parse_generation_parameters(text))
        callbacks.infotext_pasted_callback(text, params)
        skipped = self._not_sent() if sent else frozenset()
        extra = gr.update(value=True) if subseed_is_used(params) and "subseed" not in skipped else gr.skip()
        return [*control_updates(self.target, params, skipped_fields=skipped), extra, self._override_update(params), *self._script_updates(params)]

    def _not_sent(self) -> frozenset[str]:
        options = self.app.options
        return (frozenset() if options.send_seed else SEED_FIELDS) | (frozenset() if options.send_size else SIZE_FIELDS)

    def _script_updates(self, params: Mapping[str, Any]) -> list[Any]:
        """Updates of script controls; a control whose function fails stays unchanged."""
        updates = []
        for control, key in ((field[0], field[1]) for field in self.target.script_fields):
            task = f"an extension could not read {getattr(control, 'label', None)!r} from the parameters; its control stays unchanged"
            well, value = call_guest(partial(_read, params, key), task)
            is_update = isinstance(value, dict) and value.get("__type__") == "update"
            updates.append(gr.skip() if not well else value if is_update else _update(control, value))
        return updates

    def _override_update(self, params: Mapping[str, Any]) -> Any:
        pairs = [f"{name}: {value}" for name, _, value in infotext_utils.get_override_settings(dict(params), skip_fields=self.target.script_keys)]
        return gr.update(value=pairs, choices=pairs, visible=True if pairs else "hidden")

    def paste(self, prompt: str) -> list[Any]:
        """The paste button: parameters from the prompt box, or those of the last picture if it is empty."""
        return self.updates(prompt if prompt.strip() else self._last_parameters())

    def _last_parameters(self) -> str:
        file = self.app.config.data_dir / "params.txt"
        try:
            return file.read_text(encoding="utf8")
        except FileNotFoundError:
            gr.Info("Nothing to paste: the prompt is empty and no picture has been made yet.")
            return ""


def connect_dropped_picture(paster: Paster, dropped: gr.File) -> None:
    """A picture dropped on a prompt fills the controls with its parameters."""

    def read(path: str | None) -> list[Any]:
        """Updates for the (again empty) file field and the controls."""
        text, _ = read_picture(path)
        if not text:
            gr.Info("This file contains no parameters: it is no picture, it was made by another program, or its text was removed.")
        return [None, *paster.updates(text)]

    dropped.upload(read, inputs=[dropped], outputs=[dropped, *paster.outputs()], **TOLD)


def connect_paste_button(paster: Paster, button: gr.Button, prompt: gr.Textbox) -> None:
    button.click(paster.paste, inputs=[prompt], outputs=paster.outputs(), **TOLD)


def connect_gallery_button(
    button: gr.Button, paster: Paster, image: Component, gallery: gr.Gallery, generation_info: gr.Textbox, switch_js: str
) -> None:
    """Show the tab named by `switch_js` and send it the selected picture of `gallery` with its parameters."""
    index = gr.Number(value=0, visible="hidden", elem_id=f"{button.elem_id}_index")

    def send(pictures: Any, info: str, picture_index: float) -> list[Any]:
        file = picture_at(pictures, picture_index)
        if file is None:
            gr.Info("There is no picture to send yet.")
            return [gr.skip() for _ in range(len(paster.outputs()) + 1)]
        picture = str(picture_of_page(file, paster.app.config.outputs_dir))
        return [picture, *paster.updates(infotext_of(info, int(picture_index)), sent=True)]

    # show the tab before setting the picture: a control that was never visible ignores it
    shown = button.click(
        fn=None, js=f"() => {{ const index = selected_gallery_index(); {switch_js}(); return index; }}", outputs=[index], show_progress="hidden"
    )
    shown.then(send, inputs=[gallery, generation_info, index], outputs=[image, *paster.outputs()], **TOLD)


def connect_text_button(
    button: gr.Button, paster: Paster, text: Component, switch_js: str, *, image: Component | None = None, source: Component | None = None
) -> None:
    """Show the tab named by `switch_js` and fill its controls from the parameters in `text`; `image` gets the picture of `source`."""

    def send(parameters: str, file: str | None = None) -> list[Any]:
        updates = paster.updates(parameters or "", sent=image is not None)
        return updates if image is None else [file if file and Path(file).is_file() else gr.skip(), *updates]

    inputs = [text] if source is None else [text, source]
    outputs = paster.outputs() if image is None else [image, *paster.outputs()]
    shown = button.click(fn=None, js=f"() => {{ {switch_js}(); }}", show_progress="hidden")
    shown.then(send, inputs=inputs, outputs=outputs, **TOLD)
