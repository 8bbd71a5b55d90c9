"""Stable Diffusion's latents as extensions know them (other families say theirs in their `LatentFormat`), and what hires fix can do to latents."""

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
"""Ways to enlarge latents without going through pixels: arguments of the interpolation."""
