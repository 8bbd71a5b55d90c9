"""SDXL base and refiner: text features of CLIP-L and OpenCLIP bigG side by side, and a vector of the pooled text and the picture's measures.

The vector follows "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (Podell et al. 2023, section 2.2): each measure
becomes 256 sinusoidal features as a timestep would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from backend.diffusion_engine.base import EngineParts, ForgeDiffusionEngine
from backend.text_processing.classic_engine import ClassicTextProcessingEngine

FEATURES_PER_MEASURE = 256
AESTHETIC_SCORE_POSITIVE = 6.0
AESTHETIC_SCORE_NEGATIVE = 2.5


class StableDiffusionXL(ForgeDiffusionEngine):
    """SDXL base and its inpainting variant. `sdxl_crop_top` and `sdxl_crop_left` (pixels) are the caller's to set."""

    matched_guesses = ("sdxl",)
    is_sdxl = True

    def __init__(self, parts: EngineParts) -> None:
        super().__init__(parts)
        self.sdxl_crop_top = 0
        self.sdxl_crop_left = 0

    def _build_text_engines(self) -> Sequence[ClassicTextProcessingEngine]:
        clip = self.forge_objects.clip
        return [
            ClassicTextProcessingEngine(
                clip.cond_stage_model["clip_l"],
                clip.tokenizer.clip_l,
                embedding_key="clip_l",
                embeddings=self.embeddings,
                minimal_clip_skip=2,
                clip_skip=2,
                final_layer_norm=False,
            ),
            build_bigg_engine(self),
        ]

    @torch.no_grad()
    def get_learned_conditioning(self, prompt: Sequence[str]) -> dict[str, Tensor]:
        self._load_text_encoders()
        l_BLC = self._run_text_engine(0, prompt)
        g_BLC, pooled_BP = self._run_text_engine(1, prompt)
        assert isinstance(l_BLC, Tensor)
        crossattn_BLC, pooled_BP = blank_empty_negative(prompt, torch.cat([l_BLC, g_BLC.to(l_BLC)], dim=-1), pooled_BP)
        width_px, height_px = picture_size_px(prompt, self.native_size_px)
        measures = [height_px, width_px, self.sdxl_crop_top, self.sdxl_crop_left, height_px, width_px]
        return {"crossattn": crossattn_BLC, "vector": join_vector(pooled_BP, measures)}


class StableDiffusionXLRefiner(ForgeDiffusionEngine):
    """The SDXL refiner: bigG alone, and an aesthetic score in place of the target size. Its scores are the caller's to set."""

    matched_guesses = ("sdxl_refiner",)
    is_sdxl = True

    def __init__(self, parts: EngineParts) -> None:
        super().__init__(parts)
        self.sdxl_crop_top = 0
        self.sdxl_crop_left = 0
        self.sdxl_refiner_high_aesthetic_score = AESTHETIC_SCORE_POSITIVE
        self.sdxl_refiner_low_aesthetic_score = AESTHETIC_SCORE_NEGATIVE

    def _build_text_engines(self) -> Sequence[ClassicTextProcessingEngine]:
        return [build_bigg_engine(self)]

    @torch.no_grad()
    def get_learned_conditioning(self, prompt: Sequence[str]) -> dict[str, Tensor]:
        self._load_text_encoders()
        crossattn_BLC, pooled_BP = self._run_text_engine(0, prompt)
        crossattn_BLC, pooled_BP = blank_empty_negative(prompt, crossattn_BLC, pooled_BP)
        width_px, height_px = picture_size_px(prompt, self.native_size_px)
        is_negative = getattr(prompt, "is_negative_prompt", False)
        score = self.sdxl_refiner_low_aesthetic_score if is_negative else self.sdxl_refiner_high_aesthetic_score
        measures = [height_px, width_px, self.sdxl_crop_top, self.sdxl_crop_left, score]
        return {"crossattn": crossattn_BLC, "vector": join_vector(pooled_BP, measures)}


def build_bigg_engine(engine: ForgeDiffusionEngine) -> ClassicTextProcessingEngine:
    """The text engine of OpenCLIP bigG: the layer before the last, and the projected pooled vector."""
    clip = engine.forge_objects.clip
    return ClassicTextProcessingEngine(
        clip.cond_stage_model["clip_g"],
        clip.tokenizer.clip_g,
        embedding_key="clip_g",
        embeddings=engine.embeddings,
        minimal_clip_skip=2,
        clip_skip=2,
        final_layer_norm=False,
        text_projection=True,
        return_pooled=True,
    )


def blank_empty_negative(prompt: Sequence[str], crossattn_BLC: Tensor, pooled_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros in place of the text of an empty negative prompt, as SDXL was trained without text."""
    if getattr(prompt, "is_negative_prompt", False) and all(text == "" for text in prompt):
        return torch.zeros_like(crossattn_BLC), torch.zeros_like(pooled_BP)
    return crossattn_BLC, pooled_BP


def picture_size_px(prompt: Sequence[str], native_size_px: int) -> tuple[float, float]:
    """(width, height) the prompt list carries, else the model's own size."""
    return float(getattr(prompt, "width", None) or native_size_px), float(getattr(prompt, "height", None) or native_size_px)


def join_vector(pooled_BP: Tensor, measures: Sequence[float]) -> Tensor:
    """(B, P + 256 per measure): the pooled text, then sinusoidal features of each measure."""
    features = get_timestep_embedding(torch.tensor(measures, dtype=torch.float32), FEATURES_PER_MEASURE, flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([pooled_BP, features.flatten().to(pooled_BP).expand(pooled_BP.shape[0], -1)], dim=1)
