"""The engine of Stable Diffusion 1.x under Forge's name; the family is in backend/families/sd1."""

from __future__ import annotations

from backend.diffusion_engine.base import ForgeDiffusionEngine


class StableDiffusion(ForgeDiffusionEngine):
    """SD 1.x and its inpainting variant."""
