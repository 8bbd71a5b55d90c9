"""Forge's engine class by family. A family for which Forge has no class is a ForgeDiffusionEngine."""

from __future__ import annotations

from backend.diffusion_engine.base import ForgeDiffusionEngine
from backend.diffusion_engine.chroma import Chroma
from backend.diffusion_engine.flux import Flux
from backend.diffusion_engine.sd15 import StableDiffusion
from backend.diffusion_engine.sd20 import StableDiffusion2
from backend.diffusion_engine.sd35 import StableDiffusion3
from backend.diffusion_engine.sdxl import StableDiffusionXL, StableDiffusionXLRefiner

FACES: dict[str, type[ForgeDiffusionEngine]] = {
    "chroma": Chroma,
    "flux": Flux,
    "sd15": StableDiffusion,
    "sd20": StableDiffusion2,
    "sd3": StableDiffusion3,
    "sdxl": StableDiffusionXL,
    "sdxl_refiner": StableDiffusionXLRefiner,
}
