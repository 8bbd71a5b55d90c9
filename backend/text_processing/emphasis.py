"""How a prompt's weights change the text encoder's output: the four emphasis modes.

Shapes: B prompts, L tokens, C channels. Must not know how weights are written in a prompt.
"""

from __future__ import annotations

import logging
from typing import Final

import torch

log = logging.getLogger(__name__)

EMPHASIS_NAMES: Final = ("None", "Ignore", "Original", "No norm")
DEFAULT_EMPHASIS: Final = "Original"

EMPHASIS_HELP: Final = {
    "None": "brackets and weights are plain text",
    "Ignore": "brackets and weights are read and then left without effect",
    "Original": "tokens are scaled, then the whole is scaled back to its mean",
    "No norm": "tokens are scaled and left so; some SDXL checkpoints need this",
}


def resolve_emphasis_name(name: str) -> str:
    """The mode's canonical spelling. An unknown name is logged and becomes "Original"."""
    for known in EMPHASIS_NAMES:
        if known.casefold() == name.strip().casefold():
            return known
    log.warning("Emphasis mode %r is unknown; using %r. Known modes: %s.", name, DEFAULT_EMPHASIS, ", ".join(EMPHASIS_NAMES))
    return DEFAULT_EMPHASIS


def apply_emphasis(name: str, z_BLC: torch.Tensor, weights_BL: torch.Tensor) -> torch.Tensor:
    """z scaled by the weights according to mode `name`. Prompts whose weights are all 1 are returned bit for bit.

    "Original" restores each prompt's own mean, so that a prompt's condition does not depend on what else is in the batch.
    """
    if name in ("None", "Ignore") or bool((weights_BL == 1).all()):
        return z_BLC
    scaled_BLC = z_BLC * weights_BL.unsqueeze(-1)
    if name == "No norm":
        return scaled_BLC
    before_B11, after_B11 = (value.mean(dim=(1, 2), keepdim=True) for value in (z_BLC, scaled_BLC))
    restored_BLC = scaled_BLC * torch.where(after_B11 == 0, torch.ones_like(after_B11), before_B11 / after_B11)
    is_plain_B11 = (weights_BL == 1).all(dim=1).view(-1, 1, 1)
    return torch.where(is_plain_B11, z_BLC, restored_BLC)
