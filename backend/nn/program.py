"""A network as a list of segments over named tensors. A segment declares what it reads and produces; the code that places, costs or runs a
program relies only on that declaration. Knows no family of networks, no device, no sampler and no plan.

Example, a transformer of two blocks over picture and text tokens:

    start       produces "image", "text" and the constants "modulation", "rope"
    block 0     consumes ("image", "text"), produces ("image", "text"), adds Addition("block", 0, target="image")
    block 1     the same with number 1
    last 0      consumes ("image",), produces ("image",)

If it is cut after block 0, "image" and "text" cross to the other slot; both slots have the constants from the start.

Shapes: B rows; the rest is up to the network.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from backend.nn.piece import Piece
from backend.nn.tiles import CannotTile, Cut, Swaps, Tile, TileTraffic
from backend.storage.kinds import stored_bytes

logger = logging.getLogger(__name__)

TransformerOptions = dict[str, Any]
"""Forge's `transformer_options`: hooks, what the batch contains, and the current place in the network (`block`, `block_index`, ...)."""
NamedLayers = tuple[tuple[str, nn.Module], ...]
ControlLists = Mapping[str, Sequence[Tensor | None]]
"""Control residuals as ControlNets return them, by kind of place. The last of each list is used first."""
LAYER_VIEWS = "layer_views"
"""The option with the views whose `forward` was replaced, by the layer's name (`backend.nn.unet`)."""
HOOK_OPTIONS = (
    "patches",
    "patches_replace",
    "block_modifiers",
    "block_inner_modifiers",
    "group_norm_wrapper",
    "groupnorm_wrapper",
    LAYER_VIEWS,
)
"""Options that let somebody see or change what is between or inside layers."""
Told = Literal["halo rows", "norm sums", "keys and values"]

_MISFIT = (
    "A ControlNet residual of shape %s does not fit the %s block %s of shape %s and is ignored. "
    "The ControlNet is for another kind of model or another picture size: choose one made for this model."
)


@dataclass(frozen=True, slots=True)
class Addition:
    """Where a control residual is added: entry `number`, counted from the end, of the list `kind` goes to the tensor `target`.

    `at_end`: after the segment's layers, else before them.
    """

    kind: str
    number: int
    target: str
    at_end: bool = True


@dataclass(frozen=True, slots=True)
class Exchange:
    """What slots that compute tiles of the same row must exchange where `layer` (its name in the network) runs.

    `halo_rows`: how many input rows a convolution reads beyond its own tile, on each side.
    """

    told: Told
    layer: str
    halo_rows: int = 0


@dataclass(slots=True)
class ProgramState:
    """The state between two segments. Each batch of rows has its own state, which segments change in place.

    `tensors` are the live tensors by name. `residuals` are the control residuals yet to be added.
    """

    tensors: dict[str, Tensor]
    residuals: dict[Addition, Tensor] = field(default_factory=dict)
    options: TransformerOptions = field(default_factory=dict)

    def patches(self, name: str) -> Sequence[Callable[..., Any]]:
        """Hooks set with `set_model_patch(patch, name)`."""
        found: Sequence[Callable[..., Any]] = self.options.get("patches", {}).get(name, ())
        return found

    def take_facts(self, other: Any) -> None:
        """Take what another state knows besides tensors, residuals and options; `other` has passed the same segments on the same shapes."""
        return


@dataclass(frozen=True, slots=True)
class Flow:
    """What a piece reads, produces and adds, without constants, which every piece may read."""

    consumes: tuple[str, ...]
    produces: tuple[str, ...]
    adds: tuple[Addition, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment(ABC):
    """The smallest placeable run of layers. `named_layers` are its modules with their names in the network.

    `consumes`: tensors it reads, except constants. `produces`: tensors it makes or replaces. `adds`: control residuals it adds. `exchanges`: what
    tiles of one row would have to exchange in it. `inner`: tensors that cross if it is cut between two of its blocks; the parts after the first
    read only these.
    """

    kind: str
    number: int
    named_layers: NamedLayers
    consumes: tuple[str, ...]
    produces: tuple[str, ...]
    adds: tuple[Addition, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    inner: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, state: Any, first_block: int = 0, end_block: int | None = None) -> None:
        """Advance the state past this segment, or past its blocks [`first_block`, `end_block`)."""

    def run_tile(self, state: Any, tile: Tile) -> Swaps[None]:
        """Advance a tile's state past this segment. Must give the tile's part of what `__call__` gives for the whole."""
        raise CannotTile(f"The segment {self.kind} {self.number} has no code for tiles. Use another strategy (--multi-gpu-strategy).")

    @property
    def key(self) -> tuple[str, int]:
        """Forge's name of the block: ("input", 4)."""
        return self.kind, self.number

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        return tuple(layer for _, layer in self.named_layers)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters with their names in the whole network."""
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)

    def parameter_bytes(self) -> int:
        return stored_bytes(parameter for _, parameter in self.named_parameters())

    @property
    def num_blocks(self) -> int:
        """Number of blocks between which the segment may be cut; 0 if it may not be."""
        return 0

    def part_layers(self, first_block: int = 0, end_block: int | None = None) -> NamedLayers:
        """The modules with a part's weights. Includes those before the blocks if it begins at 0, and those after them if it ends at None."""
        return self.named_layers

    def add_residuals(self, state: ProgramState, *, at_end: bool) -> None:
        """Add the residuals that belong before or after the layers. One with the wrong shape is ignored with a warning."""
        for addition in self.adds:
            if addition.at_end is at_end and (residual := state.residuals.pop(addition, None)) is not None:
                state.tensors[addition.target] = self._add(state.tensors[addition.target], residual)

    def _add(self, hidden: Tensor, residual: Tensor) -> Tensor:
        if residual.shape[-2:] != hidden.shape[-2:] or residual.shape[1] != hidden.shape[1]:
            logger.warning(_MISFIT, tuple(residual.shape), *self.key, tuple(hidden.shape))
            return hidden
        return hidden + residual.to(hidden)


class Embedding(Protocol):
    """What runs before the first segment and has weights. It is placed with the first piece."""

    @property
    def named_layers(self) -> NamedLayers: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Program(ABC):
    """Embedding and segments of one network, in the order they run.

    `reads` names the inputs of a call that it uses ("x" is the noisy latents). `start` produces `inputs` and `constants`: segments consume the
    former; all segments may read the latter, which never change (embeddings, text, RoPE tables). `output` names the result.
    `control_kinds` are the lists that a ControlNet for this network fills; `residual_share`: how many residuals a usual one has per addition, if one
    residual is added in several places; `has_control_in_tiles`: residuals can be cut into the tiles of a row.
    Raises: ValueError if a segment reads something that nothing before it produces.
    """

    embedding: Embedding
    segments: tuple[Segment, ...]
    reads: tuple[str, ...]
    inputs: tuple[str, ...] = ("hidden",)
    constants: tuple[str, ...] = ()
    output: str = "hidden"
    control_kinds: tuple[str, ...] = ()
    residual_share: float = 1.0
    has_control_in_tiles: bool = True

    def __post_init__(self) -> None:
        there = {*self.inputs, *self.constants}
        for segment in self.segments:
            _check_flow(segment, there, set(self.constants))
            there.update(segment.produces)
        if self.output not in there:
            raise ValueError(f"No segment produces the output {self.output!r}. Name one of {', '.join(sorted(there))}, or add it to `produces`.")

    @abstractmethod
    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> ProgramState:
        """A new state for these rows, before the first segment. `options` and `residuals` are copied (shallow), because segments change them."""

    @abstractmethod
    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Inputs of one row as empty tensors on the meta device, for counting costs."""

    def build_control_network(self) -> nn.Module | None:
        """A new ControlNet of the usual size for this network, for counting costs on the meta device: it takes `example_rows` and a `hint`
        (1, 3, 8 H, 8 W). None if there are no ControlNets for it."""
        return None

    @abstractmethod
    def working_bytes(self, shape: Sequence[int], itemsize: int) -> float:
        """Estimated memory that a pass over latents (B, C, H, W) takes in addition to the weights."""

    def foreign_forward(self) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
        """A pass of the whole network that an extension put in the place of the segments, from the rows of a call; None if nobody did."""
        return None

    def run(self, state: ProgramState) -> Tensor:
        """Run all segments on the state's device. Returns the network's output."""
        self.run_segments(self.segments, state)
        return state.tensors[self.output]

    def run_segments(self, segments: Sequence[Segment], state: Any) -> None:
        """Advance the state past consecutive segments. A family may do the same with fewer calls in between."""
        for segment in segments:
            segment(state)

    def run_pieces(self, pieces: Sequence[Piece], state: Any) -> None:
        """Advance the state past consecutive pieces. Its tensors must be on their device."""
        segments = [self.segments[piece.segment] for piece in pieces if piece.first_block == 0 and piece.end_block is None]
        if len(segments) == len(pieces):
            self.run_segments(segments, state)
            return
        for piece in pieces:
            self.run_piece(piece, state)

    def facts_of_launches(self, state: Any) -> Hashable | None:
        """What decides, together with the shapes of the state's tensors, which kernels run from this state on. None: more than that does, such as a
        hook in Python, so that launches must not be recorded."""
        return None

    def run_piece(self, piece: Piece, state: ProgramState) -> None:
        """Advance the state past one piece. Its tensors must be on the piece's device."""
        self.segments[piece.segment](state, piece.first_block, piece.end_block)

    def flow(self, piece: Piece) -> Flow:
        """The declaration of a piece: its segment's, adjusted if it is a part."""
        segment = self.segments[piece.segment]
        is_first, is_last = piece.first_block == 0, piece.end_block is None
        return Flow(
            segment.consumes if is_first else segment.inner,
            segment.produces if is_last else segment.inner,
            tuple(one for one in segment.adds if (is_last if one.at_end else is_first)),
        )

    def name_residuals(self, control: ControlLists | None) -> dict[Addition, Tensor]:
        """Residuals by where they are added. Entries that no segment adds are dropped."""
        found: dict[Addition, Tensor] = {}
        if not control:
            return found
        for addition in (one for segment in self.segments for one in segment.adds):
            residuals = control.get(addition.kind)
            if isinstance(residuals, (list, tuple)) and addition.number < len(residuals):
                residual = residuals[-1 - addition.number]
                if residual is not None:
                    found[addition] = residual
        return found

    # tiles of one row on several slots

    def why_no_tiles(self) -> str | None:
        """Why rows of this network cannot be cut into tiles; None if they can."""
        return "this family's network has no tiles"

    def tile_traffic(self, rows: Mapping[str, Tensor]) -> TileTraffic:
        """How rows of these inputs may be cut, and what the tiles of one row exchange."""
        raise CannotTile(str(self.why_no_tiles()))

    def start_tile(self, rows: Mapping[str, Tensor], tile: Tile, *, options: TransformerOptions | None = None) -> ProgramState:
        """A tile's state before the first segment. `rows` are whole. The outputs of all tiles, joined along dim 2, are the whole's."""
        raise CannotTile(str(self.why_no_tiles()))

    def residual_of_tile(self, residual: Tensor, cut: Cut, rank: int) -> Tensor | None:
        """A tile's part of a control residual; None if its size does not fit."""
        return cut.take(residual, rank)

    # pieces

    def piece_layers(self, piece: Piece) -> NamedLayers:
        """The modules with a piece's weights, with their names in the network."""
        return self.segments[piece.segment].part_layers(piece.first_block, piece.end_block)

    def finest_parts(self, piece: Piece) -> tuple[Piece, ...]:
        """A piece split into its transformer blocks, if it has any, in the order they run."""
        count = max(1, self.segments[piece.segment].num_blocks)
        end = count if piece.end_block is None else piece.end_block
        return tuple(Piece(piece.segment, index, None if index == count - 1 else index + 1) for index in range(piece.first_block, end))

    def finest_pieces(self) -> tuple[Piece, ...]:
        """The finest pieces, in the order they run: every transformer block on its own where a segment can be cut."""
        return tuple(part for whole in self.whole_pieces() for part in self.finest_parts(whole))

    def whole_pieces(self) -> tuple[Piece, ...]:
        """One piece per segment."""
        return tuple(Piece(number) for number in range(len(self.segments)))

    def segment(self, kind: str, number: int = 0) -> Segment:
        """The segment with that name. Raises: KeyError."""
        for segment in self.segments:
            if segment.key == (kind, number):
                return segment
        raise KeyError(f"no segment {kind} {number}; there are {', '.join(f'{s.kind} {s.number}' for s in self.segments)}")


def _check_flow(segment: Segment, there: set[str], constants: set[str]) -> None:
    """Raises: ValueError if a segment reads a missing tensor or replaces a constant."""
    needed = [*segment.consumes, *(one.target for one in segment.adds if not one.at_end)]
    missing = [name for name in needed if name not in there]
    missing += [one.target for one in segment.adds if one.at_end and one.target not in there | set(segment.produces)]
    if missing:
        raise ValueError(
            f"Segment {segment.kind} {segment.number} reads {', '.join(missing)}, which nothing before it produces. Available: "
            f"{', '.join(sorted(there))}. Name it in `produces` of an earlier segment, or in `inputs` of the program."
        )
    if replaced := sorted(constants.intersection(segment.produces)):
        raise ValueError(
            f"Segment {segment.kind} {segment.number} produces the program's constant {', '.join(replaced)}. Rename it, or drop it from `constants`."
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """A tensor within a list of pieces: produced by one piece (-1: by `start`), read by others."""

    name: str
    source: int
    readers: tuple[int, ...]


def trace_tensors(program: Program, pieces: Sequence[Piece]) -> tuple[Reading, ...]:
    """Which pieces read which tensors, except constants, in the order the tensors are produced. Omits tensors that nobody reads.

    Example: in a UNet of two levels the skip of piece 0 is `Reading("skip 0", 0, (5,))`.
    """
    latest: dict[str, list[int]] = {name: [-1] for name in program.inputs}
    found = list(latest.items())
    for index, piece in enumerate(pieces):
        flow = program.flow(piece)
        for name in flow.consumes:
            if name not in program.constants:
                latest[name].append(index)
        for name in flow.produces:
            latest[name] = [index]
            found.append((name, latest[name]))
    return tuple(Reading(name, source, tuple(readers)) for name, (source, *readers) in found if readers)
