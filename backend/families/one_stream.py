"""Blocks and segments of transformers with one stream after two refiners (Z-Image, Lumina2), whose networks name the same layers differently.

A block has attention, then a gated MLP, each between two norms, with scales and gates by the time in all blocks but the text's refiners. Refiners
run over picture or text alone; the first layer joins them.

Shapes: B rows, L tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backend.nn.block_segment import BlockSegment
from backend.nn.program import Addition, ProgramState, Segment
from backend.nn.stream_layers import Rope, attend, gated, rms_norm
from backend.nn.stream_tiles import StreamPlace, attend_on_tile
from backend.nn.tiles import Swaps, Tile

IMAGE, TEXT, TOKENS, MODULATION, COSINES, SINES, MASK, FLOW = (
    "image", "text", "tokens", "modulation", "rope cosines", "rope sines", "text mask", "flow",
)  # fmt: skip
CONTEXT, NOISE, LAYER, LAST = "context_refiner", "noise_refiner", "layer", "last"
PLACES = "one_stream_places"
"""Key of where each stream's tokens are, in the options of a tile's state."""
Modulation = tuple[Tensor | float, ...]
"""Scale and gate of attention, scale and gate of the MLP."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockParts:
    """A block's layers by what they do. `modulate`: (B, T) to all four numbers (B, 4 D), None in a block that does not read the time."""

    attention: Any
    norm_before: Any
    norm_behind: Any
    up: nn.Module
    gate: nn.Module
    down: nn.Module
    mlp_norm_before: Any
    mlp_norm_behind: Any
    modulate: Callable[[Tensor], Tensor] | None


PartsOf = Callable[[Any], BlockParts]


def run_parts(parts: BlockParts, tokens_BLD: Tensor, modulation_BT: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
    """The tokens after a block. Its modulation, if any, has the network's dtype."""
    numbers = _modulate(parts, modulation_BT, tokens_BLD.dtype)
    mixed_BLD = attend(parts.attention, _norm_in(parts, tokens_BLD, numbers, modulation_BT.dtype), rope, mask)
    return _finish_block(parts, tokens_BLD, mixed_BLD, numbers, modulation_BT.dtype)


def run_parts_on_tile(parts: BlockParts, tokens_BLD: Tensor, modulation_BT: Tensor, place: StreamPlace) -> Swaps[Tensor]:
    """`run_parts` for a tile's tokens."""
    numbers = _modulate(parts, modulation_BT, tokens_BLD.dtype)
    mixed_BLD = yield from attend_on_tile(parts.attention, _norm_in(parts, tokens_BLD, numbers, modulation_BT.dtype), place)
    return _finish_block(parts, tokens_BLD, mixed_BLD, numbers, modulation_BT.dtype)


def _norm_in(parts: BlockParts, stream_BLD: Tensor, numbers: Modulation, dtype: torch.dtype) -> Tensor:
    """What attention reads."""
    return (rms_norm(parts.norm_before, stream_BLD) * numbers[0]).to(dtype)


def _finish_block(parts: BlockParts, stream_BLD: Tensor, mixed_BLD: Tensor, numbers: Modulation, dtype: torch.dtype) -> Tensor:
    """The stream after attention's result and the MLP."""
    _, attention_gate, mlp_scale, mlp_gate = numbers
    stream_BLD = stream_BLD + attention_gate * rms_norm(parts.norm_behind, mixed_BLD.to(stream_BLD.dtype))
    inner_BLD = gated(parts.up, parts.gate, parts.down, (rms_norm(parts.mlp_norm_before, stream_BLD) * mlp_scale).to(dtype))
    return stream_BLD + mlp_gate * rms_norm(parts.mlp_norm_behind, inner_BLD.to(stream_BLD.dtype))


def _modulate(parts: BlockParts, modulation_BT: Tensor, dtype: torch.dtype) -> Modulation:
    """Scales and gates of attention and MLP, (B, 1, D) each in the stream's dtype; ones in a block that does not read the time."""
    if parts.modulate is None:
        return 1.0, 1.0, 1.0, 1.0
    numbers = parts.modulate(modulation_BT).unsqueeze(1).to(dtype)
    attention_scale, attention_gate, mlp_scale, mlp_gate = numbers.chunk(4, dim=2)
    return 1.0 + attention_scale, attention_gate.tanh(), 1.0 + mlp_scale, mlp_gate.tanh()


@dataclass(frozen=True, eq=False, kw_only=True)
class StreamSegment(BlockSegment):
    """A block over `stream`; `joins`: it is the first over text and picture, of which the text comes first or last. A replacement hook takes and
    returns "img" (or "txt" in a refiner of text)."""

    stream: str
    parts_of: PartsOf
    text_first: bool
    joins: bool = False

    def _run(self, state: ProgramState) -> None:
        if self.joins:
            self._join(state, state.tensors.pop(TEXT))
        name = "txt" if self.stream == TEXT else "img"
        args = {name: state.tensors[self.stream], "vec": state.tensors[MODULATION], "pe": self._rope(state)}

        def forward(args: Mapping[str, Any]) -> Mapping[str, Tensor]:
            return {name: run_parts(self.parts_of(self.layers[0]), args[name], args["vec"], args["pe"], self._mask(state))}

        state.tensors[self.stream] = self.run_or_replace(state, args, forward)[name]

    def run_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        """Refiners of the text run whole on every tile: its few tokens cost less than exchanges."""
        state.options["block"] = self.key
        if self.stream == TEXT:
            self._run(state)
        else:
            if self.joins:
                self._join(state, state.options[PLACES][TEXT].take(state.tensors.pop(TEXT), tile.rank))
            tokens_BLD, place = state.tensors[self.stream], state.options[PLACES][self.stream]
            parts = self.parts_of(self.layers[0])
            state.tensors[self.stream] = yield from run_parts_on_tile(parts, tokens_BLD, state.tensors[MODULATION], place)
        self.add_residuals(state, at_end=True)

    def _join(self, state: ProgramState, text_BLD: Tensor) -> None:
        streams = [text_BLD, state.tensors.pop(IMAGE)]
        state.tensors[TOKENS] = torch.cat(streams if self.text_first else streams[::-1], dim=1)

    def _own(self, length: int) -> slice:
        """Where the tokens of the segment's stream are among all tokens."""
        return slice(0, length) if (self.stream == TEXT) is self.text_first else slice(-length, None)

    def _rope(self, state: ProgramState) -> Rope:
        cosines, sines = state.tensors[COSINES], state.tensors[SINES]
        if self.stream == TOKENS:
            return cosines, sines
        own = self._own(state.tensors[self.stream].shape[1])
        return cosines[:, own], sines[:, own]

    def _mask(self, state: ProgramState) -> Tensor | None:
        """Which keys count: all of the picture's."""
        mask = state.tensors.get(MASK)
        if mask is None or self.stream == IMAGE:
            return None
        return mask if self.stream == TOKENS else mask[..., self._own(state.tensors[TEXT].shape[1])]


def make_stream_segments(
    network: Any, make: Callable[..., Segment], adds_of_layer: Callable[[int], tuple[Addition, ...]] = lambda number: ()
) -> tuple[Segment, ...]:
    """One segment per refiner and layer. `make`: a StreamSegment class with its family's fields given."""
    refiners = [
        make(kind=kind, number=number, named_layers=((f"{kind}.{number}", block),), consumes=(stream,), produces=(stream,), stream=stream)
        for kind, stream in ((CONTEXT, TEXT), (NOISE, IMAGE))
        for number, block in enumerate(getattr(network, kind))
    ]
    layers = [
        make(
            kind=LAYER, number=number, named_layers=((f"layers.{number}", block),), consumes=(TOKENS,) if number else (IMAGE, TEXT),
            produces=(TOKENS,), adds=adds_of_layer(number), stream=TOKENS, joins=number == 0,
        )
        for number, block in enumerate(network.layers)
    ]  # fmt: skip
    return (*refiners, *layers)
