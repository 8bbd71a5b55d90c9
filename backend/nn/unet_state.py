"""What travels through the UNet's segments for one unit of work, and the options a hook sees. Knows no device, no model and no sampler.

Shapes: B batch, C channels, H W latent rows and columns, E width of the time embedding, L tokens, D width of a token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

TransformerOptions = dict[str, Any]
"""Forge's `transformer_options`: hooks, what the batch holds, and where in the network the pass is (`block`, `block_index`, ...)."""

_MISFIT = (
    "A ControlNet residual of shape %s does not fit the %s block %s of shape %s and is left out. "
    "The ControlNet is made for another kind of model, or for another picture size."
)


@dataclass(slots=True)
class UNetState:
    """The state between two segments. One unit owns one state; a segment changes it in place.

    `skips` is a stack: every input segment pushes one tensor, every output segment pops one. `control` holds the ControlNet
    residuals still to be added, per kind of segment; the last of a list is taken first. Between two parts of one transformer
    `hidden_BCHW` holds its tokens (B, L, D), and `transformer_input_BCHW` what will be added to its output.
    """

    hidden_BCHW: Tensor
    emb_BE: Tensor
    context_BLD: Tensor | None
    skips: list[Tensor] = field(default_factory=list)
    control: dict[str, list[Tensor | None]] = field(default_factory=dict)
    options: TransformerOptions = field(default_factory=dict)
    transformer_input_BCHW: Tensor | None = None

    def patches(self, name: str) -> Sequence[Callable[..., Any]]:
        """Hooks set with `set_model_patch(patch, name)`."""
        found: Sequence[Callable[..., Any]] = self.options.get("patches", {}).get(name, ())
        return found

    def add_control(self, hidden_BCHW: Tensor, kind: str) -> Tensor:
        """`hidden_BCHW` plus the next residual of that kind, if there is one."""
        residuals = self.control.get(kind)
        residual_BCHW = residuals.pop() if residuals else None
        if residual_BCHW is None:
            return hidden_BCHW
        if residual_BCHW.shape[-2:] != hidden_BCHW.shape[-2:] or residual_BCHW.shape[1] != hidden_BCHW.shape[1]:
            name, number = self.options.get("block", (kind, "?"))
            logger.warning(_MISFIT, tuple(residual_BCHW.shape), name, number, tuple(hidden_BCHW.shape))
            return hidden_BCHW
        return hidden_BCHW + residual_BCHW.to(hidden_BCHW)


def copy_control(control: Mapping[str, Sequence[Tensor | None]] | None) -> dict[str, list[Tensor | None]]:
    """Own lists of residuals, so that popping them leaves the caller's alone."""
    return {} if control is None else {kind: list(residuals) for kind, residuals in control.items() if isinstance(residuals, (list, tuple))}


def concat_skip(hidden_BCHW: Tensor, skip_BCHW: Tensor) -> Tensor:
    """Hidden state and skip side by side, channels first as the library does it."""
    return torch.cat([hidden_BCHW, skip_BCHW], dim=1)
