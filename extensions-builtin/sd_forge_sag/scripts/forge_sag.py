"""Self-attention guidance's panel. Costs one more pass over all pictures in each step."""

from __future__ import annotations

from typing import Any

import gradio as gr
from self_attention_guidance import SelfAttentionGuidance

from modules import scripts
from modules.infotext_utils import PasteField
from modules.ui_components import InputAccordion
from modules_forge.unet_patching import has_unet

TITLE = "SelfAttentionGuidance Integrated (SD 1.x, SD 2.x, SDXL)"
KEYS = ("sag_enabled", "sag_scale", "sag_blur_sigma", "sag_threshold")


class SAGForForge(scripts.Script):
    """Scale 0 is off."""

    sorting_priority = 12.5

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with InputAccordion(False, label=TITLE, elem_id=self.elem_id("enabled")) as enabled:
            scale = gr.Slider(label="Scale", minimum=-2.0, maximum=5.0, step=0.01, value=0.5, elem_id=self.elem_id("scale"))
            sigma = gr.Slider(label="Blur Sigma", minimum=0.0, maximum=10.0, step=0.01, value=2.0, elem_id=self.elem_id("blur_sigma"))
            threshold = gr.Slider(label="Blur mask threshold", minimum=0.0, maximum=4.0, step=0.01, value=1.0, elem_id=self.elem_id("threshold"))
        controls = [enabled, scale, sigma, threshold]
        self.infotext_fields = [PasteField(controls[0], lambda params: params.get(KEYS[0], False), api=KEYS[0])]
        self.infotext_fields += [PasteField(control, key, api=key) for control, key in zip(controls[1:], KEYS[1:])]
        self.paste_field_names = list(KEYS)
        return controls

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        values = scripts.checked_values(self, args)
        enabled, scale, sigma, threshold = values
        if not enabled or not has_unet(p, TITLE):
            return
        unet = p.sd_model.forge_objects.unet.clone()
        SelfAttentionGuidance(scale, sigma, threshold, guides_uncond=kwargs.get("uc") is not None).add_to(unet)
        p.sd_model.forge_objects.unet = unet
        p.extra_generation_params.update(zip(KEYS, values))
