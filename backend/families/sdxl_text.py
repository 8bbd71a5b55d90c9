"""SDXL's text recipe: concatenated features of CLIP-L and OpenCLIP bigG, and a vector of the pooled text and the picture's measures.

The vector follows "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (Podell et al. 2023, section 2.2): each measure
becomes 256 sinusoidal features, like a timestep.

Shapes: B prompts, L tokens, C token width, P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from backend.text_processing.classic_engine import ClassicTextProcessingEngine
from backend.text_processing.textual_inversion import EmbeddingDatabase

FEATURES_PER_MEASURE = 256
AESTHETIC_SCORE_POSITIVE = 6.0
AESTHETIC_SCORE_NEGATIVE = 2.5


def build_base_engines(
    encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], embeddings: EmbeddingDatabase
) -> Sequence[ClassicTextProcessingEngine]:
    """CLIP-L before its last layer, without the last norm; then bigG."""
    clip_l = ClassicTextProcessingEngine(
        encoders["clip_l"],
        tokenizers["clip_l"],
        embedding_key="clip_l",
        embeddings=embeddings,
        minimal_clip_skip=2,
        clip_skip=2,
        final_layer_norm=False,
    )
    return [clip_l, *build_refiner_engines(encoders, tokenizers, embeddings)]


def build_refiner_engines(
    encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], embeddings: EmbeddingDatabase
) -> Sequence[ClassicTextProcessingEngine]:
    """OpenCLIP bigG: the layer before the last, and the projected pooled vector."""
    return [
        ClassicTextProcessingEngine(
            encoders["clip_g"],
            tokenizers["clip_g"],
            embedding_key="clip_g",
            embeddings=embeddings,
            minimal_clip_skip=2,
            clip_skip=2,
            final_layer_norm=False,
            text_projection=True,
            return_pooled=True,
        )
    ]


def encode_base(side: Any, prompt: Sequence[str]) -> dict[str, Tensor]:
    """Text of both encoders; the measures are size, crop and target size, heights before widths."""
    l_BLC = side.run_text_engine(0, prompt)
    g_BLC, pooled_BP = side.run_text_engine(1, prompt)
    crossattn_BLC, pooled_BP = blank_empty_negative(prompt, torch.cat([l_BLC, g_BLC.to(l_BLC)], dim=-1), pooled_BP)
    width_px, height_px = picture_size_px(prompt, side.native_size_px)
    measures = [height_px, width_px, side.sdxl_crop_top, side.sdxl_crop_left, height_px, width_px]
    return {"crossattn": crossattn_BLC, "vector": join_vector(pooled_BP, measures)}


def encode_refiner(side: Any, prompt: Sequence[str]) -> dict[str, Tensor]:
    """Text of bigG only; an aesthetic score instead of the target size."""
    crossattn_BLC, pooled_BP = side.run_text_engine(0, prompt)
    crossattn_BLC, pooled_BP = blank_empty_negative(prompt, crossattn_BLC, pooled_BP)
    width_px, height_px = picture_size_px(prompt, side.native_size_px)
    is_negative = getattr(prompt, "is_negative_prompt", False)
    score = side.sdxl_refiner_low_aesthetic_score if is_negative else side.sdxl_refiner_high_aesthetic_score
    return {
        "crossattn": crossattn_BLC,
        "vector": join_vector(pooled_BP, [height_px, width_px, side.sdxl_crop_top, side.sdxl_crop_left, score]),
    }


def blank_empty_negative(prompt: Sequence[str], crossattn_BLC: Tensor, pooled_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Replace the text of an empty negative prompt with zeros, which SDXL's training used for no text."""
    if getattr(prompt, "is_negative_prompt", False) and all(text == "" for text in prompt):
        return torch.zeros_like(crossattn_BLC), torch.zeros_like(pooled_BP)
    return crossattn_BLC, pooled_BP


def picture_size_px(prompt: Sequence[str], native_size_px: int) -> tuple[float, float]:
    """(width, height) from the prompt list, else the model's native size."""
    return float(getattr(prompt, "width", None) or native_size_px), float(getattr(prompt, "height", None) or native_size_px)


def join_vector(pooled_BP: Tensor, measures: Sequence[float]) -> Tensor:
    """(B, P + 256 per measure): the pooled text, then sinusoidal features of each measure."""
    features = get_timestep_embedding(torch.tensor(measures, dtype=torch.float32), FEATURES_PER_MEASURE, flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([pooled_BP, features.flatten().to(pooled_BP).expand(pooled_BP.shape[0], -1)], dim=1)
