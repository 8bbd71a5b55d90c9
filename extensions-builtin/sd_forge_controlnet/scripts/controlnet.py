"""ControlNet: hints from pictures that guide the job. The panel, and the work during a job."""

from __future__ import annotations

from typing import Any

import gradio as gr
from lib_controlnet import api, external_code, global_state, infotext
from lib_controlnet.job import acts_in_pass, add_detected_map, patch_pass, prepare_unit, process_hint, read_units
from lib_controlnet.ui import UnitControls

from modules import script_callbacks, scripts, shared
from modules_forge.builtin_preprocessors import builtin_preprocessors
from modules_forge.shared import add_supported_control_model, add_supported_preprocessor, supported_preprocessors
from modules_forge.supported_controlnet import ControlNetPatcher
from modules_forge.supported_flux_pictures import FluxIPAdapterPatcher, ReduxPatcher
from modules_forge.supported_ip_adapter import IPAdapterPatcher


class ControlNetForForgeOfficial(scripts.Script):
    """Units in both tabs, one argument per unit."""

    sorting_priority = 10

    def title(self) -> str:
        return "ControlNet"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        tab = "img2img" if is_img2img else "txt2img"
        global_state.update_controlnet_filenames()
        self.infotext_fields, self.paste_field_names = [], []
        states = []
        with gr.Group(elem_id=f"{tab}_controlnet"), gr.Accordion("ControlNet Integrated", open=is_open(), elem_id=f"{tab}_controlnet_accordions"):
            for number in range(external_code.get_max_models_num()):
                controls = UnitControls(tab, number, is_img2img=is_img2img)
                controls.build()
                states.append(controls.state)
                self.infotext_fields += controls.paste_fields()
                self.paste_field_names.append(infotext.key_of(number))
        return states

    # the job

    def process(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Compute all hints and load all models. Raises RequestError."""
        units = [(number, unit) for number, unit in enumerate(read_units(args)) if unit.enabled]
        active = [prepare_unit(p, unit, number) for number, unit in units]
        p.controlnet_active_units = active
        for place, one in enumerate(active):
            p.extra_generation_params[infotext.key_of(place)] = infotext.write_unit(one.unit)
            one.preprocessor.process_after_running_preprocessors(process=p, params=one)
            process_hint(p, one)
            add_detected_map(p, one)

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Add every unit that is active in this pass to the chain. Raises RequestError for a model of another family."""
        for one in getattr(p, "controlnet_active_units", ()):
            if acts_in_pass(one.unit, p):
                patch_pass(p, one, kwargs["x"], args, kwargs)

    def postprocess_batch_list(self, p: Any, pp: Any, *args: Any, **kwargs: Any) -> None:
        for one in getattr(p, "controlnet_active_units", ()):
            one.preprocessor.process_after_every_sampling(p, one, pp, *args, **kwargs)
            if one.model is not None:
                one.model.process_after_every_sampling(p, one, pp, *args, **kwargs)

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        p.controlnet_active_units = []


def is_open() -> bool:
    """--controlnet opens the panel."""
    return bool(shared.cmd_opts.controlnet)


def register() -> None:
    """Register the preprocessors and the control model kinds; those registered by other extensions stay."""
    for preprocessor in builtin_preprocessors():
        if preprocessor.name not in supported_preprocessors:
            add_supported_preprocessor(preprocessor)
    add_supported_control_model(ControlNetPatcher)
    for kind in (FluxIPAdapterPatcher, ReduxPatcher, IPAdapterPatcher):  # files that the last refuses as made for faces may be InstantX's
        add_supported_control_model(kind)


register()
script_callbacks.on_app_started(api.add_routes)
script_callbacks.on_script_unloaded(global_state.forget_models)
