"""Stable Diffusion 1.x: one CLIP-L text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backend.diffusion_engine.base import ForgeDiffusionEngine
from backend.text_processing.classic_engine import ClassicTextProcessingEngine


class StableDiffusion(ForgeDiffusionEngine):
    """SD 1.x and its inpainting variant; also the narrow members of the family."""

    matched_guesses = ("sd15",)
    is_sd1 = True

    def _build_text_engines(self) -> Sequence[ClassicTextProcessingEngine]:
        clip = self.forge_objects.clip
        return [
            ClassicTextProcessingEngine(clip.cond_stage_model["clip_l"], clip.tokenizer.clip_l, embedding_key="clip_l", embeddings=self.embeddings)
        ]

    @torch.no_grad()
    def get_learned_conditioning(self, prompt: Sequence[str]) -> Tensor:
        self._load_text_encoders()
        cond_BLC = self._run_text_engine(0, prompt)
        assert isinstance(cond_BLC, Tensor)
        return cond_BLC
