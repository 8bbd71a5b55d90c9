"""Kohya HRFix' panel."""

from __future__ import annotations

from typing import Any

import gradio as gr
from deep_shrink import METHODS, patch_hrfix

from modules import scripts
from modules.infotext_utils import PasteField
from modules.ui_components import InputAccordion
from modules_forge.unet_patching import has_unet

TITLE = "Kohya HRFix Integrated"
KEYS = tuple(
    f"kohya_hrfix_{name}"
    for name in ("enabled", "block_number", "downscale_factor", "start_percent", "end_percent")
    + ("downscale_after_skip", "downscale_method", "upscale_method")
)


class KohyaHRFixForForge(scripts.Script):
    """Percentages are of the noise schedule: 0 is all noise."""

    sorting_priority = 14

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with InputAccordion(False, label=TITLE, elem_id=self.elem_id("enabled")) as enabled:
            with gr.Row():
                block = gr.Slider(label="Block Number", value=3, minimum=1, maximum=32, step=1, elem_id=self.elem_id("block_number"))
                factor = gr.Slider(
                    label="Downscale Factor", value=2.0, minimum=0.1, maximum=9.0, step=0.001, elem_id=self.elem_id("downscale_factor")
                )
            with gr.Row():
                start = gr.Slider(label="Start Percent", value=0.0, minimum=0.0, maximum=1.0, step=0.001, elem_id=self.elem_id("start_percent"))
                end = gr.Slider(label="End Percent", value=0.35, minimum=0.0, maximum=1.0, step=0.001, elem_id=self.elem_id("end_percent"))
            after_skip = gr.Checkbox(label="Downscale After Skip", value=True, elem_id=self.elem_id("downscale_after_skip"))
            with gr.Row():
                down = gr.Dropdown(label="Downscale Method", choices=list(METHODS), value=METHODS[0], elem_id=self.elem_id("downscale_method"))
                up = gr.Dropdown(label="Upscale Method", choices=list(METHODS), value=METHODS[0], elem_id=self.elem_id("upscale_method"))
        controls = [enabled, block, factor, start, end, after_skip, down, up]
        self.infotext_fields = [PasteField(controls[0], lambda params: params.get(KEYS[0], False), api=KEYS[0])]
        self.infotext_fields += [PasteField(control, key, api=key) for control, key in zip(controls[1:], KEYS[1:])]
        self.paste_field_names = list(KEYS)
        return controls

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        values = scripts.checked_values(self, args)
        enabled, block, factor, start, end, after_skip, down, up = values
        if not enabled or not has_unet(p, TITLE):
            return
        unet = p.sd_model.forge_objects.unet
        sigmas = unet.model.predictor.percent_to_sigma(start), unet.model.predictor.percent_to_sigma(end)
        p.sd_model.forge_objects.unet = patch_hrfix(unet, block, factor, sigmas, after_skip=after_skip, down=down, up=up)
        p.extra_generation_params.update(zip(KEYS, values))
