"""Skip-layer guidance for SD3.5: away from what the transformer says when some of its blocks are left out. Improves anatomy of SD3.5 medium.

Costs one more pass over all pictures in each guided step; its rows are dealt to the slots like any others.
Source: Stability AI, SD3.5 medium (2024); equal to `skip_guidance_layers` of diffusers' StableDiffusion3Pipeline, with its usual numbers.

Shapes: B rows, C channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from torch import Tensor

from backend.sampling.sampling_function import calc_cond_uncond_batch
from modules import scripts
from modules.errors import RequestError
from modules.infotext_utils import PasteField
from modules.ui_components import InputAccordion
from modules_forge.unet_patching import StepWindow

TITLE = "SkipLayerGuidance Integrated (SD 3.5)"
KEYS = ("slg_enabled", "slg_layers", "slg_scale", "slg_start_step", "slg_end_step")
LAYERS, SCALE, START, END = "7, 8, 9", 2.8, 0.01, 0.2
MAX_LAYERS_LENGTH = 200


class SkipLayerGuidance:
    """A post-CFG function: adds scale * (x0 - x0 of the network without these blocks), for the prompt's branch."""

    def __init__(self, layers: Sequence[int], scale: float, window: Any) -> None:
        self._layers, self._scale, self._window = tuple(layers), scale, window

    def __call__(self, args: dict[str, Any]) -> Tensor:
        denoised_BCHW: Tensor = args["denoised"]
        if self._scale <= 0.0 or not self._window.is_open:
            return denoised_BCHW
        options = dict(args["model_options"])
        options["transformer_options"] = {**options.get("transformer_options", {}), "skip_layers": self._layers}
        skipped_BCHW, _ = calc_cond_uncond_batch(args["model"], args["cond"], None, args["input"], args["sigma"], options)
        return denoised_BCHW + self._scale * (args["cond_denoised"] - skipped_BCHW)


def parse_layers(text: str, num_layers: int) -> list[int]:
    """ "7, 8, 9" -> [7, 8, 9]. Raises: RequestError for anything but numbers of blocks that the model has."""
    parts = [part.strip() for part in str(text)[:MAX_LAYERS_LENGTH].split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() and len(part) < 4 and int(part) < num_layers for part in parts):
        raise RequestError(f"{KEYS[1]} is {str(text)[:MAX_LAYERS_LENGTH]!r}; send numbers of blocks from 0 to {num_layers - 1}, like {LAYERS!r}.")
    return sorted({int(part) for part in parts})


class SkipLayerGuidanceForForge(scripts.Script):
    """Scale 0 is off. Only steps between start and end are guided."""

    sorting_priority = 14

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with InputAccordion(False, label=TITLE, elem_id=self.elem_id("enabled")) as enabled:
            with gr.Row():
                layers = gr.Textbox(label="Layers", value=LAYERS, max_length=MAX_LAYERS_LENGTH, elem_id=self.elem_id("layers"))
                scale = gr.Slider(label="Scale", minimum=0.0, maximum=10.0, step=0.1, value=SCALE, elem_id=self.elem_id("scale"))
            with gr.Row():
                start = gr.Slider(label="Start step", minimum=0.0, maximum=1.0, step=0.01, value=START, elem_id=self.elem_id("start_step"))
                end = gr.Slider(label="End step", minimum=0.0, maximum=1.0, step=0.01, value=END, elem_id=self.elem_id("end_step"))
        controls = [enabled, layers, scale, start, end]
        self.infotext_fields = [PasteField(controls[0], lambda params: params.get(KEYS[0], False), api=KEYS[0])]
        self.infotext_fields += [PasteField(control, key, api=key) for control, key in zip(controls[1:], KEYS[1:])]
        self.paste_field_names = list(KEYS)
        return controls

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        values = scripts.checked_values(self, args)
        enabled, layers, scale, start, end = values
        if not enabled:
            return
        blocks = getattr(p.sd_model.forge_objects.unet.model.diffusion_model, "joint_blocks", None)
        if blocks is None:
            p.comment(f"{TITLE} leaves out blocks of SD 3's transformer. This model has none, so it has no effect.")
            return
        unet, window = p.sd_model.forge_objects.unet.clone(), StepWindow(p, start, end)
        unet.set_model_sampler_post_cfg_function(SkipLayerGuidance(parse_layers(layers, len(blocks)), scale, window))
        window.watch(unet)
        p.sd_model.forge_objects.unet = unet
        p.extra_generation_params.update(zip(KEYS, values))
