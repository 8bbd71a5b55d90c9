"""Never OOM: weights always stream, and the VAE always works in tiles, until a job without it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from backend import memory_management
from backend.memory_management import VRAMState
from modules import scripts

TITLE = "Never OOM Integrated"


class NeverOOMForForge(scripts.Script):
    """Slower, for pictures that would not fit otherwise."""

    sorting_priority = 18

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with gr.Accordion(open=False, label=TITLE, elem_id=self.elem_id("accordion")):
            unet = gr.Checkbox(label="Enabled for UNet (always maximize offload)", value=False, elem_id=self.elem_id("unet_enabled"))
            vae = gr.Checkbox(label="Enabled for VAE (always tiled)", value=False, elem_id=self.elem_id("vae_enabled"))
        return [unet, vae]

    def process(self, p: Any, *args: Any, **kwargs: Any) -> None:
        streams, tiled = scripts.checked_values(self, args)
        memory_management.VAE_ALWAYS_TILED = tiled
        memory_management.set_vram_state(VRAMState.NO_VRAM if streams else None)
