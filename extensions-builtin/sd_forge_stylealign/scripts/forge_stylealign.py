"""StyleAlign: the pictures of a batch look at each other in self-attention, so that they get one style.

All rows of a branch must be on one slot, so the UNet stays whole on the first; the plan says so.
Source: Hertz et al., "Style Aligned Image Generation via Shared Attention" (2023), equation 3 without its AdaIN, as in Forge.

Shapes: B rows, R rows of one branch, L tokens, D width of a token.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
import torch
from torch import Tensor

from backend.attention import attention_function
from modules import scripts
from modules.infotext_utils import PasteField
from modules_forge.unet_patching import has_unet

TITLE = "StyleAlign Integrated"
KEYS = ("stylealign_enabled", "stylealign_strength")


class SharedAttention:
    """A replacement of attn1. `strength` 0 is each picture's own attention, 1 the shared one."""

    keeps_rows_together = "StyleAlign shares attention among the pictures of a batch"

    def __init__(self, strength: float) -> None:
        self._strength = strength

    def __call__(self, q_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, options: dict[str, Any]) -> Tensor:
        heads = options["n_heads"]
        own_BLD = attention_function(q_BLD, k_BLD, v_BLD, heads) if self._strength < 1.0 else q_BLD
        result_BLD = torch.empty_like(q_BLD)
        for rows in (options["cond_indices"], options["uncond_indices"]):
            if rows:
                q_RLD, k_RLD, v_RLD = q_BLD[rows], k_BLD[rows], v_BLD[rows]
                joined = (tensor.flatten(0, 1).expand(len(rows), -1, -1) for tensor in (k_RLD, v_RLD))
                shared_RLD = attention_function(q_RLD, *joined, heads)
                result_BLD[rows] = torch.lerp(own_BLD[rows], shared_RLD, self._strength)
        return result_BLD


class StyleAlignForForge(scripts.Script):
    """Acts on batches of more than one picture."""

    sorting_priority = 17

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with gr.Accordion(open=False, label=TITLE, elem_id=self.elem_id("accordion")):
            shared = gr.Checkbox(label="Share attention in batch", value=False, elem_id=self.elem_id("shared_attention"))
            strength = gr.Slider(label="Strength", minimum=0.0, maximum=1.0, step=0.01, value=1.0, elem_id=self.elem_id("strength"))
        self.infotext_fields = [
            PasteField(shared, lambda params: params.get(KEYS[0], False), api=KEYS[0]),
            PasteField(strength, KEYS[1], api=KEYS[1]),
        ]
        self.paste_field_names = list(KEYS)
        return [shared, strength]

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        shared, strength = scripts.checked_values(self, args)
        if not shared or not has_unet(p, TITLE):
            return
        unet = p.sd_model.forge_objects.unet.clone()
        unet.set_model_replace_all(SharedAttention(strength), "attn1")
        p.sd_model.forge_objects.unet = unet
        p.extra_generation_params.update(zip(KEYS, (shared, strength)))
