"""Forge's names of the engines of SDXL and its refiner; the families are in backend/families/sdxl and sdxl_refiner.

`sdxl_crop_top`, `sdxl_crop_left` (pixels) and the refiner's aesthetic scores are attributes that callers set.
"""

from __future__ import annotations

from backend.diffusion_engine.base import ForgeDiffusionEngine


class StableDiffusionXL(ForgeDiffusionEngine):
    """SDXL base and its inpainting variant."""


class StableDiffusionXLRefiner(ForgeDiffusionEngine):
    """The SDXL refiner."""
