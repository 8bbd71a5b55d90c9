"""Forge's name of the engine of Chroma; the family is in backend/families/chroma."""

from __future__ import annotations

from backend.diffusion_engine.base import ForgeDiffusionEngine


class Chroma(ForgeDiffusionEngine):
    """Chroma1-HD, Chroma1-Base and their fine-tunes."""

    @property
    def text_processing_engine_t5(self) -> object:
        """T5, whose features are the text."""
        return self.text_engines[0]
