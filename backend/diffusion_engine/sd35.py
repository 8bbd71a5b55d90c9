"""Forge's name of the engine of SD3 and SD3.5; the family is in backend/families/sd3."""

from __future__ import annotations

from backend.diffusion_engine.base import ForgeDiffusionEngine


class StableDiffusion3(ForgeDiffusionEngine):
    """SD3 medium, SD3.5 medium, large and large-turbo. `is_sd3` says so."""

    is_sd3 = True

    @property
    def text_processing_engine_l(self) -> object:
        return self.text_engines[0]

    @property
    def text_processing_engine_g(self) -> object:
        return self.text_engines[1]

    @property
    def text_processing_engine_t5(self) -> object | None:
        """None if the model was loaded without T5."""
        return self.text_engines[2] if len(self.text_engines) > 2 else None
