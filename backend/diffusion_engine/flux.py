"""Forge's name of the engine of Flux.1; the family is in backend/families/flux."""

from __future__ import annotations

from backend.diffusion_engine.base import ForgeDiffusionEngine


class Flux(ForgeDiffusionEngine):
    """Flux.1: dev, Krea-dev, Kontext, schnell and Fill. `is_flux` says so."""

    is_flux = True

    @property
    def text_processing_engine_t5(self) -> object:
        """T5, whose features are the text."""
        return self.text_engines[0]

    @property
    def text_processing_engine_l(self) -> object:
        """CLIP-L, whose pooled vector steers the modulation."""
        return self.text_engines[1]
