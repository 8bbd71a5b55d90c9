"""The engines of SDXL and its refiner under Forge's names; the families are in backend/families/sdxl and sdxl_refiner.

Callers set the attributes `sdxl_crop_top`, `sdxl_crop_left` (pixels) and the refiner's aesthetic scores.
"""

from __future__ import annotations

from backend.diffusion_engine.base import ForgeDiffusionEngine


class StableDiffusionXL(ForgeDiffusionEngine):
    """SDXL base and its inpainting variant."""


class StableDiffusionXLRefiner(ForgeDiffusionEngine):
    """The SDXL refiner."""
