"""A network as a list of segments over named tensors. A segment declares what it reads and what it leaves; whoever places, costs or runs a
program reads that declaration. Knows no family of networks, no device, no sampler and no plan.

Example, a transformer of two blocks over picture and text tokens:

    start       leaves "image", "text" and the constants "modulation", "rope"
    block 0     consumes ("image", "text"), produces ("image", "text"), adds Addition("block", 0, target="image")
    block 1     the same with number 1
    last 0      consumes ("image",), produces ("image",)

Cut behind block 0, "image" and "text" cross to the other slot; the constants are on both from the start.

Shapes: B rows, the rest is the network's own.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from backend.nn.piece import Piece

logger = logging.getLogger(__name__)

TransformerOptions = dict[str, Any]
"""Forge's `transformer_options`: hooks, what the batch holds, and where in the network the pass is (`block`, `block_index`, ...)."""
NamedLayers = tuple[tuple[str, nn.Module], ...]
ControlLists = Mapping[str, Sequence[Tensor | None]]
"""Control residuals as ControlNets give them, by kind of place; the last of a list is taken first."""
Told = Literal["halo rows", "norm sums", "keys and values"]

_MISFIT = (
    "A ControlNet residual of shape %s does not fit the %s block %s of shape %s and is left out. "
    "The ControlNet is made for another kind of model, or for another picture size."
)


@dataclass(frozen=True, slots=True)
class Addition:
    """Where a control residual lands: entry `number`, counted from the end, of the list `kind` is added to the tensor `target`.

    `at_end`: behind the segment's layers, else before them.
    """

    kind: str
    number: int
    target: str
    at_end: bool = True


@dataclass(frozen=True, slots=True)
class Exchange:
    """What slots that compute tiles of one row must tell each other where `layer` runs, by its name in the network.

    `halo_rows`: rows of its input that a convolution reads beyond its own, on either side.
    """

    told: Told
    layer: str
    halo_rows: int = 0


@dataclass(slots=True)
class ProgramState:
    """The state between two segments. One unit of work owns one state; a segment changes it in place.

    `tensors` are those alive here and now, by name. `residuals` are control residuals still to be added.
    """

    tensors: dict[str, Tensor]
    residuals: dict[Addition, Tensor] = field(default_factory=dict)
    options: TransformerOptions = field(default_factory=dict)

    def patches(self, name: str) -> Sequence[Callable[..., Any]]:
        """Hooks set with `set_model_patch(patch, name)`."""
        found: Sequence[Callable[..., Any]] = self.options.get("patches", {}).get(name, ())
        return found


@dataclass(frozen=True, slots=True)
class Flow:
    """What a piece reads, leaves and adds. Constants are not in it: every piece may read them."""

    consumes: tuple[str, ...]
    produces: tuple[str, ...]
    adds: tuple[Addition, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment(ABC):
    """The smallest placeable run of layers. `named_layers` are its modules under their names in the network.

    `consumes`: tensors it reads, but for constants. `produces`: tensors it leaves, new or in place of those of the same name. `adds`: control
    residuals it takes. `exchanges`: what tiles of one row would tell each other in it. `inner`: tensors that go along where it is cut between
    two of its blocks; the parts behind the first read these alone.
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
        """Move the state past this segment, or past the part of it from one of its blocks to before another."""

    @property
    def key(self) -> tuple[str, int]:
        """Forge's name of the block: ("input", 4)."""
        return self.kind, self.number

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        return tuple(layer for _, layer in self.named_layers)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their names in the whole network."""
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)

    def parameter_bytes(self) -> int:
        return sum(parameter.nbytes for _, parameter in self.named_parameters())

    @property
    def num_blocks(self) -> int:
        """Blocks between which the segment may be cut; 0 where it may not."""
        return 0

    def part_layers(self, first_block: int = 0, end_block: int | None = None) -> NamedLayers:
        """The modules with the weights of a part: all before the blocks when it begins at 0, all behind them when it ends at None."""
        return self.named_layers

    def add_residuals(self, state: ProgramState, *, at_end: bool) -> None:
        """Add what is due before or behind the layers. A residual of another shape is left out with a warning."""
        for addition in self.adds:
            if addition.at_end is at_end and (residual := state.residuals.pop(addition, None)) is not None:
                state.tensors[addition.target] = self._add(state.tensors[addition.target], residual)

    def _add(self, hidden: Tensor, residual: Tensor) -> Tensor:
        if residual.shape[-2:] != hidden.shape[-2:] or residual.shape[1] != hidden.shape[1]:
            logger.warning(_MISFIT, tuple(residual.shape), *self.key, tuple(hidden.shape))
            return hidden
        return hidden + residual.to(hidden)


class Embedding(Protocol):
    """What runs before the first segment and has weights of its own. It goes with the first piece."""

    @property
    def named_layers(self) -> NamedLayers: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Program(ABC):
    """Embedding and segments of one network, in the order they run.

    `reads` names the inputs of a call that it takes ("x" is the noisy latents). `inputs` and `constants` are the tensors that `start` leaves:
    segments take the former; the latter are there for all of them and never change (embeddings, text, RoPE tables). `output` names the result.
    `control_kinds` are the lists that a ControlNet for this network fills.
    Raises: ValueError where a segment reads what nothing before it leaves.
    """

    embedding: Embedding
    segments: tuple[Segment, ...]
    reads: tuple[str, ...]
    inputs: tuple[str, ...] = ("hidden",)
    constants: tuple[str, ...] = ()
    output: str = "hidden"
    control_kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        there = {*self.inputs, *self.constants}
        for segment in self.segments:
            _check_flow(segment, there, set(self.constants))
            there.update(segment.produces)
        if self.output not in there:
            raise ValueError(f"No segment leaves the output {self.output!r}; there are {', '.join(sorted(there))}.")

    @abstractmethod
    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> ProgramState:
        """A fresh state for these rows, before the first segment. `options` and `residuals` are copied (shallow), as segments change them."""

    @abstractmethod
    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Inputs of one row, as empty tensors on the meta device, for counting costs."""

    @abstractmethod
    def working_bytes(self, shape: Sequence[int], itemsize: int) -> float:
        """Estimate of the memory that a pass over latents (B, C, H, W) takes beside the weights."""

    def run(self, state: ProgramState) -> Tensor:
        """All segments on the device the state is on; returns the network's output."""
        for segment in self.segments:
            segment(state)
        return state.tensors[self.output]

    def run_piece(self, piece: Piece, state: ProgramState) -> None:
        """Move the state past one piece; its tensors are on the piece's device."""
        self.segments[piece.segment](state, piece.first_block, piece.end_block)

    def flow(self, piece: Piece) -> Flow:
        """The declaration of a piece: its segment's, or that of a part of it."""
        segment = self.segments[piece.segment]
        is_first, is_last = piece.first_block == 0, piece.end_block is None
        return Flow(
            segment.consumes if is_first else segment.inner,
            segment.produces if is_last else segment.inner,
            tuple(one for one in segment.adds if (is_last if one.at_end else is_first)),
        )

    def name_residuals(self, control: ControlLists | None) -> dict[Addition, Tensor]:
        """Residuals by where they are added. Entries of a list that no segment takes are left out."""
        found: dict[Addition, Tensor] = {}
        for addition in (one for segment in self.segments for one in segment.adds):
            residuals = (control or {}).get(addition.kind)
            if isinstance(residuals, (list, tuple)) and addition.number < len(residuals):
                residual = residuals[-1 - addition.number]
                if residual is not None:
                    found[addition] = residual
        return found

    # pieces

    def piece_layers(self, piece: Piece) -> NamedLayers:
        """The modules with the weights of a piece, under their names in the network."""
        return self.segments[piece.segment].part_layers(piece.first_block, piece.end_block)

    def finest_parts(self, piece: Piece) -> tuple[Piece, ...]:
        """A piece as its transformer blocks, where it has some; in the order they run."""
        count = max(1, self.segments[piece.segment].num_blocks)
        end = count if piece.end_block is None else piece.end_block
        return tuple(Piece(piece.segment, index, None if index == count - 1 else index + 1) for index in range(piece.first_block, end))

    def finest_pieces(self) -> tuple[Piece, ...]:
        """Every transformer block a piece of its own, where a segment can be cut; in the order they run."""
        return tuple(part for whole in self.whole_pieces() for part in self.finest_parts(whole))

    def whole_pieces(self) -> tuple[Piece, ...]:
        """Every segment a piece."""
        return tuple(Piece(number) for number in range(len(self.segments)))

    def segment(self, kind: str, number: int = 0) -> Segment:
        """The segment of that name. Raises: KeyError."""
        for segment in self.segments:
            if segment.key == (kind, number):
                return segment
        raise KeyError(f"no segment {kind} {number}; there are {', '.join(f'{s.kind} {s.number}' for s in self.segments)}")


def _check_flow(segment: Segment, there: set[str], constants: set[str]) -> None:
    """Raises: ValueError where a segment reads what is not there, or replaces a constant."""
    needed = [*segment.consumes, *(one.target for one in segment.adds if not one.at_end)]
    missing = [name for name in needed if name not in there]
    missing += [one.target for one in segment.adds if one.at_end and one.target not in there | set(segment.produces)]
    if missing:
        raise ValueError(
            f"Segment {segment.kind} {segment.number} reads {', '.join(missing)}, which nothing before it leaves; there are "
            f"{', '.join(sorted(there))}. A segment before it has to name them in `produces`, or the program in `inputs`."
        )
    if replaced := sorted(constants.intersection(segment.produces)):
        raise ValueError(f"Segment {segment.kind} {segment.number} produces {', '.join(replaced)}, which the program calls constant.")


@dataclass(frozen=True, slots=True)
class Reading:
    """A tensor on its way through a list of pieces: left by one piece (-1: by `start`), read by others."""

    name: str
    source: int
    readers: tuple[int, ...]


def trace_tensors(program: Program, pieces: Sequence[Piece]) -> tuple[Reading, ...]:
    """Who reads what, constants aside, in the order the tensors come into being. What nobody reads is not in it.

    For a UNet of two levels the skip of piece 0 reads `Reading("skip 0", 0, (5,))`.
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
