"""Stable Diffusion 2.x: one OpenCLIP-H text encoder, read at its last used layer but one of the published tower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backend.diffusion_engine.base import ForgeDiffusionEngine
from backend.text_processing.classic_engine import ClassicTextProcessingEngine


class StableDiffusion2(ForgeDiffusionEngine):
    """SD 2.x, noise or velocity prediction. The tower's unused last block was left out at loading, so clip skip 1 is the published setting."""

    matched_guesses = ("sd20",)
    is_sd2 = True

    def _build_text_engines(self) -> Sequence[ClassicTextProcessingEngine]:
        clip = self.forge_objects.clip
        return [
            ClassicTextProcessingEngine(clip.cond_stage_model["clip_h"], clip.tokenizer.clip_h, embedding_key="clip_h", embeddings=self.embeddings)
        ]

    @torch.no_grad()
    def get_learned_conditioning(self, prompt: Sequence[str]) -> Tensor:
        self._load_text_encoders()
        cond_BLC = self._run_text_engine(0, prompt)
        assert isinstance(cond_BLC, Tensor)
        return cond_BLC
