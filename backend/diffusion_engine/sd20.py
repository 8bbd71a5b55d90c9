"""The engine of Stable Diffusion 2.x under Forge's name; the family is in backend/families/sd2."""

from __future__ import annotations

from backend.diffusion_engine.base import ForgeDiffusionEngine


class StableDiffusion2(ForgeDiffusionEngine):
    """SD 2.x, noise or velocity prediction."""
