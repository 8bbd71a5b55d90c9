"""Segments of Flux's kind whose modulations come ready, as vectors in the constant "modulation" (B, M, D), instead of from a matrix in each block.

Chroma's net makes other vectors for every block; Flux.2's blocks of a kind share theirs.

Shapes: B rows, L tokens, M modulation vectors, D token width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from backend.families.flux.program import IMAGE, MODULATION, TOKENS, DoubleSegment, LastSegment, SingleSegment
from backend.families.flux.tiles import TilePlace
from backend.nn.flux_layers import Rope, bare, norm_with, run_double_with, run_single_with
from backend.nn.program import ProgramState
from backend.nn.tiles import Tile

MASK = "text mask"
"""Which keys count, if the rows' texts have different lengths."""


def split_vectors(modulation_BMD: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Shifts, scales and gates, (B, 1, D) each, in the streams' dtype."""
    return modulation_BMD.to(dtype).split(1, dim=1)  # type: ignore[no-untyped-call,no-any-return]


@dataclass(frozen=True, eq=False, kw_only=True)
class VectorDoubleSegment(DoubleSegment):
    """A block with two streams. `first_picture`, `first_text`: numbers of its first vectors, six of each. A hook's "vec" are all 12."""

    first_picture: int
    first_text: int

    def _modulation(self, state: ProgramState) -> Tensor:
        vectors = state.tensors[MODULATION]
        return torch.cat([vectors[:, start : start + 6] for start in (self.first_picture, self.first_text)], dim=1)

    def _forward(self, state: ProgramState, args: Mapping[str, Any]) -> Mapping[str, Tensor]:
        parts = split_vectors(args["vec"], args["img"].dtype)
        image_BLD, text_BTD = run_double_with(
            self.layers[0], args["img"], args["txt"], (parts[:6], parts[6:]), args["vec"].dtype, args["pe"], state.tensors.get(MASK)
        )
        return {"img": image_BLD, "txt": text_BTD}

    def _tile_modulations(self, state: ProgramState) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        parts = split_vectors(self._modulation(state), state.tensors[IMAGE].dtype)
        return parts[:6], parts[6:]

    def _place(self, state: ProgramState, tile: Tile) -> TilePlace:
        return replace(super()._place(state, tile), mask=state.tensors.get(MASK))


@dataclass(frozen=True, eq=False, kw_only=True)
class VectorSingleSegment(SingleSegment):
    """A block with one stream. `first`: number of its first vector of three, which are a hook's "vec"."""

    first: int

    def _modulation(self, state: ProgramState) -> Tensor:
        return state.tensors[MODULATION][:, self.first : self.first + 3]

    def _forward(self, state: ProgramState, args: Mapping[str, Any]) -> Mapping[str, Tensor]:
        parts = split_vectors(args["vec"], args["img"].dtype)
        return {"img": self._run_block(args["img"], parts, args["vec"].dtype, args["pe"], state.tensors.get(MASK))}

    def _run_block(self, tokens_BLD: Tensor, modulations: Sequence[Tensor], dtype: torch.dtype, rope: Rope, mask: Tensor | None) -> Tensor:
        return run_single_with(self.layers[0], tokens_BLD, modulations, dtype, rope, mask)

    def _tile_modulations(self, state: ProgramState) -> Sequence[Tensor]:
        return split_vectors(self._modulation(state), state.tensors[TOKENS].dtype)

    def _place(self, state: ProgramState, tile: Tile) -> TilePlace:
        return replace(super()._place(state, tile), mask=state.tensors.get(MASK))


class VectorLastSegment(LastSegment):
    """Turns the picture's tokens back into latents, with the last two vectors."""

    def _project(self, image_BLD: Tensor, state: ProgramState) -> Tensor:
        vectors = state.tensors[MODULATION]
        shift, scale = split_vectors(vectors[:, -2:], image_BLD.dtype)
        return self.network.proj_out(norm_with(bare(self.network.norm_out), image_BLD, scale, shift, vectors.dtype))  # type: ignore[no-any-return]
