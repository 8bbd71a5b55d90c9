"""FreeU's panel. Channels decide where it acts: four times the model's for B1 and S1, twice for B2 and S2, as in the authors' code."""

from __future__ import annotations

from typing import Any

import gradio as gr
from freeu_blocks import patch_freeu

from modules import scripts
from modules.infotext_utils import PasteField
from modules.ui_components import InputAccordion
from modules_forge.unet_patching import StepWindow, has_unet

TITLE = "FreeU Integrated (SD 1.x, SD 2.x, SDXL)"
NO_PRESET = "(presets)"
PRESETS: dict[str, tuple[float, ...]] = {
    "Forge default": (1.01, 1.02, 0.99, 0.95, 0.0, 1.0),
    "SD 1.4": (1.3, 1.4, 0.9, 0.2, 0.0, 1.0),
    "SD 1.5": (1.5, 1.6, 0.9, 0.2, 0.0, 1.0),
    "SD 2.1": (1.4, 1.6, 0.9, 0.2, 0.0, 1.0),
    "SDXL": (1.3, 1.4, 0.9, 0.2, 0.0, 1.0),
}
KEYS = ("freeu_enabled", "freeu_b1", "freeu_b2", "freeu_s1", "freeu_s2", "freeu_start", "freeu_end")


class FreeUForForge(scripts.Script):
    """B1, B2: factors of the backbone. S1, S2: factors of the skips' low frequencies. Outside of start..end the UNet is as it is."""

    sorting_priority = 12

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        accordion_id = f"extensions-freeu{'-img2img' if is_img2img else ''}"
        with InputAccordion(False, label=TITLE, elem_id=accordion_id, elem_classes=["extensions-freeu"]) as enabled:
            with gr.Row():
                b1 = gr.Slider(label="B1", minimum=0, maximum=2, step=0.01, value=1.01, elem_id=self.elem_id("b1"))
                b2 = gr.Slider(label="B2", minimum=0, maximum=2, step=0.01, value=1.02, elem_id=self.elem_id("b2"))
            with gr.Row():
                s1 = gr.Slider(label="S1", minimum=0, maximum=4, step=0.01, value=0.99, elem_id=self.elem_id("s1"))
                s2 = gr.Slider(label="S2", minimum=0, maximum=4, step=0.01, value=0.95, elem_id=self.elem_id("s2"))
            with gr.Row():
                start = gr.Slider(label="Start step", minimum=0.0, maximum=1.0, step=0.01, value=0.0, elem_id=self.elem_id("start"))
                end = gr.Slider(label="End step", minimum=0.0, maximum=1.0, step=0.01, value=1.0, elem_id=self.elem_id("end"))
            preset = gr.Dropdown(label="Preset", choices=[NO_PRESET, *PRESETS], value=NO_PRESET, elem_id=self.elem_id("preset"))
        numbers = [b1, b2, s1, s2, start, end]
        preset.input(lambda name: [*PRESETS.get(name, (gr.skip(),) * len(numbers)), NO_PRESET], inputs=[preset], outputs=[*numbers, preset])
        controls = [enabled, *numbers]
        self.infotext_fields = [PasteField(controls[0], lambda params: params.get(KEYS[0], False), api=KEYS[0])]
        self.infotext_fields += [PasteField(control, key, api=key) for control, key in zip(controls[1:], KEYS[1:])]
        self.paste_field_names = list(KEYS)
        return controls

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        values = scripts.checked_values(self, args)
        enabled, b1, b2, s1, s2, start, end = values
        if not enabled or not has_unet(p, TITLE):
            return
        unet = p.sd_model.forge_objects.unet
        channels = unet.model.diffusion_model.config["model_channels"]
        factors = {4 * channels: (b1, s1), 2 * channels: (b2, s2)}
        p.sd_model.forge_objects.unet = patch_freeu(unet, factors, StepWindow(p, start, end))
        p.extra_generation_params.update(zip(KEYS, values))
