"""Perturbed-attention guidance: away from what the network says when its middle self-attention maps every token to itself.

Costs one more pass over all pictures in each step; its rows are dealt to the slots like any others.
Source: Ahn et al., "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance" (2024), equation 16. Equal to diffusers' PAG pipelines
with `pag_applied_layers="mid"`.

Shapes: B rows, L tokens, D width of a token, C channels, H W latent rows and columns.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
from torch import Tensor

from backend.patcher.base import set_model_options_patch_replace
from backend.sampling.sampling_function import calc_cond_uncond_batch
from modules import scripts
from modules.infotext_utils import PasteField
from modules.ui_components import InputAccordion
from modules_forge.unet_patching import StepWindow, has_unet

TITLE = "PerturbedAttentionGuidance Integrated"
KEYS = ("pagi_enabled", "pagi_scale", "pagi_attenuation", "pagi_start_step", "pagi_end_step")


def attend_to_itself(q_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention whose map is the identity."""
    return v_BLD


class PerturbedGuidance:
    """A post-CFG function: adds scale * (x0 - x0 of the perturbed network). After each step the scale falls by `attenuation` percent of its start."""

    def __init__(self, scale: float, attenuation: float, window: StepWindow) -> None:
        self._scale, self._fall, self._window = scale, scale * attenuation / 100.0, window

    def __call__(self, args: dict[str, Any]) -> Tensor:
        denoised_BCHW: Tensor = args["denoised"]
        if self._scale <= 0.0 or not self._window.is_open:
            return denoised_BCHW
        options = set_model_options_patch_replace(dict(args["model_options"]), attend_to_itself, "attn1", "middle", 0)
        perturbed_BCHW, _ = calc_cond_uncond_batch(args["model"], args["cond"], None, args["input"], args["sigma"], options)
        scale, self._scale = self._scale, self._scale - self._fall
        return denoised_BCHW + scale * (args["cond_denoised"] - perturbed_BCHW)


class PerturbedAttentionGuidanceForForge(scripts.Script):
    """Scale 0 is off. Only steps between start and end are guided."""

    sorting_priority = 13

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with InputAccordion(False, label=TITLE, elem_id=self.elem_id("enabled")) as enabled:
            with gr.Row():
                scale = gr.Slider(label="Scale", minimum=0.0, maximum=100.0, step=0.1, value=3.0, elem_id=self.elem_id("scale"))
                attenuation = gr.Slider(
                    label="Attenuation (linear, % of scale)", minimum=0.0, maximum=100.0, step=0.1, value=0.0, elem_id=self.elem_id("attenuation")
                )
            with gr.Row():
                start = gr.Slider(label="Start step", minimum=0.0, maximum=1.0, step=0.01, value=0.0, elem_id=self.elem_id("start_step"))
                end = gr.Slider(label="End step", minimum=0.0, maximum=1.0, step=0.01, value=1.0, elem_id=self.elem_id("end_step"))
        controls = [enabled, scale, attenuation, start, end]
        self.infotext_fields = [PasteField(controls[0], lambda params: params.get(KEYS[0], False), api=KEYS[0])]
        self.infotext_fields += [PasteField(control, key, api=key) for control, key in zip(controls[1:], KEYS[1:])]
        self.paste_field_names = list(KEYS)
        return controls

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        values = scripts.checked_values(self, args)
        enabled, scale, attenuation, start, end = values
        if not enabled or not has_unet(p, TITLE):
            return
        unet, window = p.sd_model.forge_objects.unet.clone(), StepWindow(p, start, end)
        unet.set_model_sampler_post_cfg_function(PerturbedGuidance(scale, attenuation, window))
        window.watch(unet)
        p.sd_model.forge_objects.unet = unet
        p.extra_generation_params.update(zip(KEYS, values))
