"""What a network costs, piece by piece: bytes, work, and the bytes that cross each cut. Numbers only; knows no slots, plans or tensors.

"Per row" means one row of a batch (one image, one branch) at the profile's picture size. Costs grow linearly with the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from backend.nn.piece import Piece
from backend.nn.tiles import TileTraffic


@dataclass(frozen=True, slots=True)
class TakenSkip:
    """A tensor that a piece takes from an earlier piece other than the one directly before it. `source` is the earlier piece's index."""

    source: int
    bytes_per_row: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceCost:
    """One piece at the finest level: a segment, or one block of its transformer.

    `work_per_row` is what times are computed from: FLOPs (two per multiply-add) or, once times have been measured, the piece's share of them
    in FLOPs. `num_kernels` is how many operations a forward launches. `hidden_bytes_per_row` is what the next piece reads,
    `residual_bytes_per_row` what must travel with it if the segment is cut here. `skip_bytes_per_row` is what it leaves for later pieces, `takes`
    what it takes from earlier ones. `control_bytes_per_row` are the ControlNet residuals added in it.
    `working_bytes_per_row` is the peak while it runs, without weights and without skips that wait for other pieces. `largest_layer_bytes` is what
    its largest layer takes while it is fetched, if the piece streams.
    """

    piece: Piece
    weight_bytes: int
    flops_per_row: float
    work_per_row: float
    num_kernels: int
    hidden_bytes_per_row: int
    residual_bytes_per_row: int = 0
    skip_bytes_per_row: int = 0
    takes: tuple[TakenSkip, ...] = ()
    control_bytes_per_row: int = 0
    working_bytes_per_row: int = 0
    largest_layer_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelProfile:
    """A network at one picture size and dtype.

    `embedding_bytes` are the weights of the time embedding, which stay with the first piece. Its result (`emb_bytes_per_row`) and the context
    are sent to every slot that runs a piece. Latents arrive and results leave in every step. `tiles`: what tiles of one row exchange, in
    numbers of `itemsize` bytes; None if the network's rows cannot be cut.
    """

    name: str
    pieces: tuple[PieceCost, ...]
    embedding_bytes: int
    emb_bytes_per_row: int
    context_bytes_per_row: int
    latent_bytes_per_row: int
    output_bytes_per_row: int
    tiles: TileTraffic | None = None
    itemsize: int = 2

    def __post_init__(self) -> None:
        if not self.pieces:
            raise ValueError(f"The profile of {self.name} has no pieces; it needs at least one.")
        for index, cost in enumerate(self.pieces):
            for taken in cost.takes:
                if not 0 <= taken.source < index:
                    raise ValueError(f"Piece {index} of {self.name} takes the skip of piece {taken.source}, which does not run before it.")

    @property
    def copy_bytes_per_row(self) -> int:
        """Bytes per row and step to a whole copy on another device and back."""
        return self.latent_bytes_per_row + self.context_bytes_per_row + self.output_bytes_per_row

    @property
    def weight_bytes(self) -> int:
        return self.embedding_bytes + sum(cost.weight_bytes for cost in self.pieces)

    @property
    def work_per_row(self) -> float:
        return sum(cost.work_per_row for cost in self.pieces)

    @property
    def flops_per_row(self) -> float:
        return sum(cost.flops_per_row for cost in self.pieces)

    @property
    def control_bytes_per_row(self) -> int:
        """All residuals of a ControlNet."""
        return sum(cost.control_bytes_per_row for cost in self.pieces)

    @property
    def share_before_control(self) -> float:
        """Share of the work before the first residual is added; 0 if no piece is known to add one."""
        first = next((index for index, cost in enumerate(self.pieces) if cost.control_bytes_per_row), 0)
        return sum(cost.work_per_row for cost in self.pieces[:first]) / max(self.work_per_row, 1e-9)

    @property
    def num_kernels(self) -> int:
        return sum(cost.num_kernels for cost in self.pieces)

    @property
    def largest_layer_bytes(self) -> int:
        return max(cost.largest_layer_bytes for cost in self.pieces)

    @property
    def skip_bytes_per_row(self) -> int:
        return sum(cost.skip_bytes_per_row for cost in self.pieces)

    def working_bytes_per_row(self) -> int:
        """Peak of one row's activations with the whole network on one slot, including skips."""
        held_bytes, peak_bytes = 0, 0
        for cost in self.pieces:
            held_bytes -= sum(taken.bytes_per_row for taken in cost.takes)
            peak_bytes = max(peak_bytes, held_bytes + cost.working_bytes_per_row)
            held_bytes += cost.skip_bytes_per_row
        return peak_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentCost:
    """Another network next to the UNet. With `runs_per_row` (a ControlNet) it runs before the UNet for every row, otherwise once per picture.

    `tiles`: what tiles of one row exchange in a ControlNet's pass; None if its rows cannot be cut.
    """

    name: str
    weight_bytes: int
    flops_per_row: float = 0.0
    working_bytes_per_row: int = 0
    num_kernels: int = 0
    runs_per_row: bool = False
    tiles: TileTraffic | None = None


def with_measured_ms(profile: ModelProfile, measured_ms: Mapping[Piece, float]) -> ModelProfile:
    """The profile with work divided among pieces in proportion to measured times. The total work does not change.

    Times may be for finer or coarser pieces than the profile's. The time of a coarser piece is divided among its parts by FLOPs. Pieces that
    were not measured keep their FLOPs; the measured pieces together keep theirs. Pieces of equal costs, as most blocks of a transformer are, get the
    median of their times: a piece is measured once, and what differs among them is noise. Example: four equal blocks of 9, 10, 19 and 10 ms count 10.
    """
    shares = _even_out(profile.pieces, [_measured_share(cost, profile.pieces, measured_ms) for cost in profile.pieces])
    known_flops = sum(cost.flops_per_row for cost, share in zip(profile.pieces, shares) if share is not None)
    known_ms = sum(share for share in shares if share is not None)
    if known_ms <= 0 or known_flops <= 0:
        return profile
    scale = known_flops / known_ms
    pieces = tuple(
        cost if share is None else replace(cost, work_per_row=share * scale) for cost, share in zip(profile.pieces, shares)
    )  # fmt: skip
    return replace(profile, pieces=pieces)


def _measured_share(cost: PieceCost, pieces: Sequence[PieceCost], measured_ms: Mapping[Piece, float]) -> float | None:
    """The piece's own time, or its share by FLOPs of the smallest measured piece that contains it; None if no such piece was measured."""
    around = [piece for piece in measured_ms if contains(piece, cost.piece)]
    if not around:
        return None
    whole = min(around, key=lambda piece: sum(contains(piece, other.piece) for other in pieces))
    flops = sum(other.flops_per_row for other in pieces if contains(whole, other.piece))
    return measured_ms[whole] * cost.flops_per_row / flops if flops > 0 else measured_ms[whole]


def _even_out(pieces: Sequence[PieceCost], shares: Sequence[float | None]) -> list[float | None]:
    """The shares, with the median of those of equal pieces for each of them."""
    alike: dict[tuple[float, ...], list[float]] = {}
    for cost, share in zip(pieces, shares, strict=True):
        if share is not None:
            alike.setdefault(_kind_of(cost), []).append(share)
    return [None if share is None else median(alike[_kind_of(cost)]) for cost, share in zip(pieces, shares, strict=True)]


def _kind_of(cost: PieceCost) -> tuple[float, ...]:
    """Equal for pieces that compute the same with other weights."""
    return cost.flops_per_row, cost.weight_bytes, cost.num_kernels, cost.working_bytes_per_row


def contains(outer: Piece, inner: Piece) -> bool:
    """Whether `inner` lies completely within `outer`."""
    if outer.segment != inner.segment or inner.first_block < outer.first_block:
        return False
    return outer.end_block is None or (inner.end_block is not None and inner.end_block <= outer.end_block)


def merge_pieces(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Joins adjacent parts of a segment: 4[0:1], 4[1:2], 4[2:] -> 4."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last is not None and last.segment == piece.segment and last.end_block == piece.first_block:
            merged[-1] = Piece(piece.segment, last.first_block, piece.end_block)
        else:
            merged.append(piece)
    return tuple(merged)
