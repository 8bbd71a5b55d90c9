"""SD3's text recipe: features of CLIP-L and OpenCLIP bigG side by side, padded to T5's width, then T5's. The vector is both pooled texts.

T5 is optional: without it, or with `sd3_enable_t5` off, zeros take its place, as in training, where it was left out half of the time (Esser et al.
2024, section 5.3.3). An empty negative prompt is zeros throughout, as in Forge.

Shapes: B prompts, L tokens, C token width of a CLIP, D token width of the transformer, P width of a pooled text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.checkpoint_file import TensorFile
from backend.checkpoint_layout import Part
from backend.families.family import FoundDenoiser, TextEngine
from backend.families.sdxl_text import blank_empty_negative
from backend.families.t5_text import read_t5_shape, t5xxl
from backend.families.unet_family import clip_g, clip_l, is_slot
from backend.text_processing.classic_engine import ClassicTextProcessingEngine
from backend.text_processing.t5_engine import MIN_LENGTH, T5TextProcessingEngine
from backend.text_processing.textual_inversion import EmbeddingDatabase

CLIP_L, CLIP_G, T5 = 0, 1, 2
"""Positions of the text engines; the token counter at the prompt box uses the first."""


def _takes_t5(file: TensorFile, part: Part, found: FoundDenoiser) -> bool:
    return read_t5_shape(file, part).width == int(found.config["joint_attention_dim"])


TEXT_ENCODERS = (
    replace(clip_l(is_slot("clip_l")), usual_file="clip_l.safetensors (0.25 GB)"),
    replace(clip_g(is_slot("clip_g")), usual_file="clip_g.safetensors (1.39 GB)"),
    replace(t5xxl(_takes_t5), is_optional=True),
)


def build_text_engines(encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], embeddings: EmbeddingDatabase) -> Sequence[TextEngine]:
    """Both CLIPs before their last layer, without the last norm; T5 if it is there."""
    clips = [
        ClassicTextProcessingEngine(
            encoders[name], tokenizers[name], embedding_key=name, embeddings=embeddings, minimal_clip_skip=2, clip_skip=2, final_layer_norm=False,
            text_projection=name == "clip_g", return_pooled=True,
        )
        for name in ("clip_l", "clip_g")
    ]  # fmt: skip
    return [*clips, *([T5TextProcessingEngine(encoders["t5xxl"], tokenizers["t5xxl"])] if "t5xxl" in encoders else [])]


def encode(side: Any, prompt: Sequence[str]) -> dict[str, Tensor]:
    """ "crossattn" (B, L, D) and "vector" (B, P)."""
    l_BLC, pooled_l_BP = side.run_text_engine(CLIP_L, prompt)
    g_BLC, pooled_g_BP = side.run_text_engine(CLIP_G, prompt)
    clip_BLD = _widen(torch.cat([l_BLC, g_BLC.to(l_BLC)], dim=-1), int(side.model_config.unet_config["joint_attention_dim"]))
    if len(side.text_engines) > T5 and side.sd3_enable_t5:
        t5_BLD = side.run_text_engine(T5, prompt).to(clip_BLD)
    else:
        t5_BLD = clip_BLD.new_zeros(clip_BLD.shape[0], MIN_LENGTH, clip_BLD.shape[2])
    crossattn_BLD, vector_BP = blank_empty_negative(prompt, torch.cat([clip_BLD, t5_BLD], dim=1), torch.cat([pooled_l_BP, pooled_g_BP], dim=-1))
    return {"crossattn": crossattn_BLD, "vector": vector_BP}


def _widen(text_BLC: Tensor, width: int) -> Tensor:
    return functional.pad(text_BLC, (0, width - text_BLC.shape[-1]))
