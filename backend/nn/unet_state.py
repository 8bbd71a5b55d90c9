"""The state that passes through a UNet's segments for one batch of rows, and the names of its tensors. Knows no device, no model and no sampler.

Shapes: B batch, C channels, H W latent rows and columns, E width of the time embedding, L tokens, D width of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from backend.nn.program import ProgramState
from backend.nn.program import TransformerOptions as TransformerOptions

HIDDEN, EMBEDDING, CONTEXT, TRANSFORMER_INPUT = "hidden", "embedding", "context", "transformer input"


def skip_name(number: int) -> str:
    """The name of the skip that input segment `number` produces."""
    return f"skip {number}"


@dataclass(slots=True)
class UNetState(ProgramState):
    """A UNet's state. Between two parts of one transformer, `hidden_BCHW` is its tokens (B, L, D), and `transformer_input_BCHW` what will be
    added to its output. `skip_sizes` are the rows and columns of every skip so far; an upsampler matches the size of the next one."""

    skip_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def take_facts(self, other: UNetState) -> None:
        self.skip_sizes.update(other.skip_sizes)

    @property
    def hidden_BCHW(self) -> Tensor:
        return self.tensors[HIDDEN]

    @hidden_BCHW.setter
    def hidden_BCHW(self, hidden: Tensor) -> None:
        self.tensors[HIDDEN] = hidden

    @property
    def emb_BE(self) -> Tensor:
        return self.tensors[EMBEDDING]

    @property
    def context_BLD(self) -> Tensor | None:
        return self.tensors.get(CONTEXT)

    @property
    def transformer_input_BCHW(self) -> Tensor | None:
        return self.tensors.get(TRANSFORMER_INPUT)

    @transformer_input_BCHW.setter
    def transformer_input_BCHW(self, tensor: Tensor | None) -> None:
        if tensor is None:
            self.tensors.pop(TRANSFORMER_INPUT, None)
        else:
            self.tensors[TRANSFORMER_INPUT] = tensor


def concat_skip(hidden_BCHW: Tensor, skip_BCHW: Tensor) -> Tensor:
    """Hidden state and skip concatenated along channels, hidden state first, as the library does it."""
    return torch.cat([hidden_BCHW, skip_BCHW], dim=1)
