"""The latents of SD3's VAE."""

from __future__ import annotations

from backend.families.latent_format import LatentFormat
from backend.families.sd3.identify import LATENT_CHANNELS, PATCH

LATENT = LatentFormat(channels=LATENT_CHANNELS, factor=8, scale=1.5305, shift=0.0609, cell=PATCH)
