"""Settings in the generation tabs: those chosen on the settings page "Settings in UI". They apply to the jobs of the tab alone."""

from __future__ import annotations

from typing import Any

import gradio as gr

from modules import scripts, shared, ui_settings
from modules.infotext_utils import infotext_to_setting_name_mapping
from modules.ui_components import FormColumn

OWNED_BY_THE_PAGE = ("sd_model_checkpoint", "sd_vae", "CLIP_stop_at_last_layers", "forge_additional_modules", "forge_unet_storage_dtype")


class ExtraOptionsSection(scripts.Script):
    """One argument per setting, in the chosen order."""

    section = "extra_options"

    def __init__(self) -> None:
        self.setting_names: list[str] = []
        self._start: list[Any] = []

    def title(self) -> str:
        return "Extra options"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        tab, options = ("img2img" if is_img2img else "txt2img"), shared.opts
        self.setting_names = list_settings(options, getattr(options, f"extra_options_{tab}"))
        controls, columns = [], max(1, int(options.extra_options_cols))
        around = gr.Accordion("Options", open=False, elem_id=f"extra_options_{tab}") if options.extra_options_accordion else None
        with around if around is not None and self.setting_names else gr.Group(elem_id=f"extra_options_{tab}", visible=bool(self.setting_names)):
            for first in range(0, len(self.setting_names), columns):
                with gr.Row():
                    for name in self.setting_names[first : first + columns]:
                        with FormColumn():
                            controls.append(ui_settings.create_setting_component(name, elem_id=f"setting_{name}_{tab}"))
        self._start = [control.value for control in controls]
        keys = {name: key for key, name in infotext_to_setting_name_mapping}
        keys |= {name: options.data_labels[name].infotext for name in self.setting_names if options.data_labels[name].infotext}
        self.infotext_fields = [(control, keys[name]) for name, control in zip(self.setting_names, controls) if name in keys]
        self.paste_field_names = [keys[name] for name in self.setting_names if name in keys]
        return controls

    def before_process(self, p: Any, *args: Any) -> None:
        """What a request says itself counts more; a request through the API that leaves a control alone means the setting as it is now."""
        for name, start, value in zip(self.setting_names, self._start, args):
            if name not in p.override_settings and not (p.is_api and value == start):
                p.override_settings[name] = value


def list_settings(options: Any, wanted: list[str]) -> list[str]:
    """The chosen settings that requests may override, once each: none that the page shows anyway, that only this machine may change, or that name
    a folder or file."""
    known = options.data_labels
    return [
        name
        for name in dict.fromkeys(wanted)
        if name in known and name not in OWNED_BY_THE_PAGE and not known[name].restrict_api and known[name].path_kind is None
    ]
