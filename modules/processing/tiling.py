"""Tileable pictures: convolutions wrap around the edges. Enabled for the duration of a job that asks for it."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn


def apply_tiling(engine: Any, enabled: bool) -> None:
    """Make every convolution of the engine's UNet and VAE circular, or restore it."""
    if engine.tiling_enabled == enabled:
        return
    mode: Literal["circular", "zeros"] = "circular" if enabled else "zeros"
    for root in (engine.forge_objects.unet.model, engine.forge_objects.vae.first_stage_model):
        for module in root.modules():
            if isinstance(module, nn.Conv2d) and module.padding_mode in ("circular", "zeros"):
                module.padding_mode = mode
    engine.tiling_enabled = enabled
