"""The panel of dynamic thresholding, which replaces the guidance formula."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import gradio as gr
from dynamic_threshold import MEASURES, MODES, STARTPOINTS, DynamicThreshold
from torch import Tensor

from modules import scripts
from modules.infotext_utils import PasteField

TITLE = "DynamicThresholding (CFG-Fix) Integrated"
NAMES = tuple(field.name for field in fields(DynamicThreshold))
KEYS = ("dynthres_enabled", *(f"dynthres_{name}" for name in NAMES))


class DynamicThresholdingForForge(scripts.Script):
    """Useful with CFG scales above the mimicked one."""

    sorting_priority = 11

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        def slider(label: str, most: float, step: float, value: float) -> Any:
            return gr.Slider(label=label, minimum=0.0, maximum=most, step=step, value=value, elem_id=self.elem_id(label.lower().replace(" ", "_")))

        def radio(label: str, choices: tuple[str, ...]) -> Any:
            return gr.Radio(label=label, choices=list(choices), value=choices[0], elem_id=self.elem_id(label.lower().replace(" ", "_")))

        with gr.Accordion(open=False, label=TITLE, elem_id=self.elem_id("accordion")):
            controls = [
                gr.Checkbox(label="Enabled", value=False, elem_id=self.elem_id("enabled")),
                slider("Mimic Scale", 100.0, 0.5, 7.0),
                slider("Threshold Percentile", 1.0, 0.01, 1.0),
                radio("Mimic Mode", tuple(MODES)),
                slider("Mimic Scale Min", 100.0, 0.5, 0.0),
                radio("Cfg Mode", tuple(MODES)),
                slider("Cfg Scale Min", 100.0, 0.5, 0.0),
                slider("Sched Val", 100.0, 0.01, 1.0),
                radio("Separate Feature Channels", ("enable", "disable")),
                radio("Scaling Startpoint", STARTPOINTS),
                radio("Variability Measure", MEASURES),
                slider("Interpolate Phi", 1.0, 0.01, 1.0),
            ]
        self.infotext_fields = [PasteField(controls[0], lambda params: params.get(KEYS[0], False), api=KEYS[0])]
        self.infotext_fields += [PasteField(control, key, api=key) for control, key in zip(controls[1:], KEYS[1:])]
        self.paste_field_names = list(KEYS)
        return controls

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        values = scripts.checked_values(self, args)
        if not values[0]:
            return
        named = dict(zip(NAMES, values[1:]))
        named["separate_feature_channels"] = named["separate_feature_channels"] == "enable"
        threshold = DynamicThreshold(**named)

        def guide(args: dict[str, Any]) -> Tensor:
            if args["cond_scale"] == 1.0:  # a step without guidance
                return args["cond"]
            timestep = float(args["model"].predictor.timestep(args["sigma"])[0])
            x_BCHW: Tensor = args["input"]
            return x_BCHW - threshold.guide(args["cond_denoised"], args["uncond_denoised"], args["cond_scale"], timestep)

        unet = p.sd_model.forge_objects.unet.clone()
        unet.set_model_sampler_cfg_function(guide)
        p.sd_model.forge_objects.unet = unet
        p.extra_generation_params.update(zip(KEYS, values))
