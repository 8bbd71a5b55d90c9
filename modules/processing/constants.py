"""Stable Diffusion's latents as extensions know them (other families declare theirs in `LatentFormat`), and latent upscaling in hires fix."""

from __future__ import annotations

from typing import Any

opt_C = 4
opt_f = 8

LATENT_UPSCALE_MODES: dict[str, dict[str, Any]] = {
    "Latent": {"mode": "bilinear", "antialias": False},
    "Latent (antialiased)": {"mode": "bilinear", "antialias": True},
    "Latent (bicubic)": {"mode": "bicubic", "antialias": False},
    "Latent (bicubic antialiased)": {"mode": "bicubic", "antialias": True},
    "Latent (nearest)": {"mode": "nearest", "antialias": False},
    "Latent (nearest-exact)": {"mode": "nearest-exact", "antialias": False},
}
"""Ways to upscale latents directly: arguments for the interpolation."""
