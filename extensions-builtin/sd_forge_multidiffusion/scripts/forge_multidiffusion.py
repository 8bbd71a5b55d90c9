"""The panel of MultiDiffusion and Mixture of Diffusers."""

from __future__ import annotations

from typing import Any

import gradio as gr
from overlapping_views import GAUSSIAN, PLAIN, ViewedNetwork, list_views

from backend import memory_management
from modules import scripts
from modules.errors import RequestError
from modules.infotext_utils import PasteField

TITLE = "MultiDiffusion Integrated"
PX_PER_LATENT = 8
MAX_VIEWS = 1024
"""A step is not interrupted between its views."""
KEYS = tuple(f"multidiffusion_{name}" for name in ("enabled", "method", "tile_width", "tile_height", "tile_overlap", "tile_batch_size"))


class MultiDiffusionForForge(scripts.Script):
    """Sizes are pixels of the result. "Tile Batch Size" is how many views each GPU has in the network at once."""

    sorting_priority = 16

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with gr.Accordion(open=False, label=TITLE, elem_id=self.elem_id("accordion")):
            enabled = gr.Checkbox(label="Enabled", value=False, elem_id=self.elem_id("enabled"))
            method = gr.Radio(label="Method", choices=[PLAIN, GAUSSIAN], value=PLAIN, elem_id=self.elem_id("method"))
            width = gr.Slider(label="Tile Width", minimum=16, maximum=8192, step=16, value=768, elem_id=self.elem_id("tile_width"))
            height = gr.Slider(label="Tile Height", minimum=16, maximum=8192, step=16, value=768, elem_id=self.elem_id("tile_height"))
            overlap = gr.Slider(label="Tile Overlap", minimum=0, maximum=2048, step=32, value=64, elem_id=self.elem_id("tile_overlap"))
            at_once = gr.Slider(label="Tile Batch Size", minimum=1, maximum=8192, step=1, value=4, elem_id=self.elem_id("tile_batch_size"))
        controls = [enabled, method, width, height, overlap, at_once]
        self.infotext_fields = [PasteField(controls[0], lambda params: params.get(KEYS[0], False), api=KEYS[0])]
        self.infotext_fields += [PasteField(control, key, api=key) for control, key in zip(controls[1:], KEYS[1:])]
        self.paste_field_names = list(KEYS)
        return controls

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        values = scripts.checked_values(self, args)
        enabled, method, width, height, overlap, at_once = values
        if not enabled:
            return
        unet = p.sd_model.forge_objects.unet.clone()
        size = height // PX_PER_LATENT, width // PX_PER_LATENT
        num_views = len(list_views(*kwargs["x"].shape[-2:], *size, overlap // PX_PER_LATENT))
        if num_views > MAX_VIEWS:
            raise RequestError(f"{TITLE}: tiles of {width}x{height} are {num_views} views of this picture; {MAX_VIEWS} at most. Choose larger tiles.")
        num_slots = len(memory_management.current_store().slots)
        unet.set_model_unet_function_wrapper(ViewedNetwork(method, size, overlap // PX_PER_LATENT, at_once, num_slots))
        p.sd_model.forge_objects.unet = unet
        p.extra_generation_params.update(zip(KEYS, values))
