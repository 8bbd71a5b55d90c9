"""Tiles of rows: the part of a row that each slot computes, and how a tile's code waits for the other tiles without blocking a thread.

Code that runs a tile is a generator. It sends with `peers.post`, goes on with whatever does not depend on the answer, and yields where it does;
whoever drives it resumes it once the other tiles' tensors have arrived. All tiles of a row run the same code, so the n-th post of one belongs to
the n-th post of the others.

Example, two tiles of a group norm: each posts its sums, yields, and gets {other rank: (the other's sums,)}.

Knows no slots, threads or devices. Shapes: B rows, C channels, H W latent rows and columns of a tile.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Tensors = tuple[Tensor, ...]
Received = Mapping[int, Tensors]
"""What other tiles sent in one exchange, by their ranks."""


@dataclass(frozen=True, slots=True)
class Awaited:
    """What a tile waits for: the messages of `peers` in exchange `number`."""

    number: int
    peers: tuple[int, ...]


Swaps = Generator[Awaited, Received, Result]
"""A tile's work: yields what it waits for, gets what came, returns its result."""


class Peers(Protocol):
    """A tile's access to the other tiles of its rows."""

    @property
    def rank(self) -> int: ...

    @property
    def count(self) -> int: ...

    def post(self, outgoing: Mapping[int, Tensors]) -> Awaited:
        """Send tensors to other tiles, by rank, and return the claim to what they send in the same exchange. Both sides must name each other.

        Others may read the tensors from now on: never change them in place.
        """
        ...


class CannotTile(ValueError):
    """Rows of this network or this call cannot be cut into tiles; the message says why."""


def divide_into_tiles(length: int, speeds: Sequence[float], unit: int = 1) -> tuple[int, ...]:
    """How many of `length` rows each tile gets, at least `unit`, such that the last is done as early as possible. Ties go to the earlier tile.

    Example: 64 rows, speeds 1.0 and 0.6, unit 8 -> (40, 24).
    Raises: CannotTile if there are not `unit` rows for each.
    """
    if length < unit * len(speeds):
        raise CannotTile(f"{length} rows cannot be cut into {len(speeds)} tiles of at least {unit} rows. Use fewer slots or a larger picture.")
    rows = [unit] * len(speeds)
    for _ in range(length - unit * len(speeds)):
        rows[min(range(len(speeds)), key=lambda tile: (rows[tile] + 1) / speeds[tile])] += 1
    return tuple(rows)


@dataclass(frozen=True, slots=True)
class TileTraffic:
    """What tiles of one row exchange in one pass of the network. Numbers count tensor elements.

    `length` rows (of latents or tokens) can be cut, each tile has at least `unit`. `num_exchanges`: how often a tile waits for others.
    `halo_numbers`: what a tile sends to one neighbor. `sum_numbers`: what it sends to every other tile, in fp32. `shared_numbers`: keys and values
    of all tiles together; each tile receives what is not its own.
    """

    length: int
    unit: int
    num_exchanges: int
    halo_numbers: int
    sum_numbers: int
    shared_numbers: int

    def arriving_bytes(self, rows: Sequence[int], itemsize: int) -> tuple[int, ...]:
        """Bytes that arrive at each tile, for tiles of these many rows."""
        last = len(rows) - 1
        return tuple(
            itemsize * ((min(rank, 1) + min(last - rank, 1)) * self.halo_numbers + self.shared_numbers * (sum(rows) - own) // sum(rows))
            + last * self.sum_numbers * max(4, itemsize)
            for rank, own in enumerate(rows)
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a row is cut into tiles. `bounds`: where each tile begins at the outermost level, and the end of the last: (0, 32, 64).

    At level n, after n halvings, a tile begins at its outermost begin / 2^n, rounded up.
    """

    bounds: tuple[int, ...]

    @classmethod
    def of_rows(cls, rows: Sequence[int]) -> Cut:
        """From how many rows each tile has."""
        return cls((0, *accumulate(rows)))

    def begins(self, level: int = 0) -> tuple[int, ...]:
        """Where each tile begins at a level, and the end of the last."""
        return tuple(-(-bound // (1 << level)) for bound in self.bounds)

    def span(self, rank: int, level: int = 0) -> tuple[int, int]:
        """First row and end of a tile at a level."""
        begins = self.begins(level)
        return begins[rank], begins[rank + 1]

    def take(self, whole_BCHW: Tensor, rank: int) -> Tensor | None:
        """A tile's rows of a whole tensor, at the level whose height it has; None if it has none's."""
        level = 0
        while (height := self.begins(level)[-1]) > max(1, whole_BCHW.shape[2]):
            level += 1
        if height != whole_BCHW.shape[2]:
            return None
        start, end = self.span(rank, level)
        return whole_BCHW[:, :, start:end]


def residual_of_rows(residual: Tensor, cut: Cut, rank: int) -> Tensor | None:
    """A tile's part of a control residual for picture tokens, (B, L, D) row by row or (B, D, rows, columns); None if they are not whole rows."""
    start, end = cut.span(rank)
    if residual.ndim == 4:
        return residual[:, :, start:end] if residual.shape[2] == cut.bounds[-1] else None
    columns, rest = divmod(residual.shape[1], cut.bounds[-1])
    return None if rest else residual[:, start * columns : end * columns]


@dataclass(slots=True, eq=False)
class NormMemory:
    """A tile's own sums of group norms, by the number of the exchange: of the pass before, if what arrives is of that pass too (`before`), and of
    this pass (`now`)."""

    before: Mapping[int, Tensor] = field(default_factory=dict)
    now: dict[int, Tensor] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Tile:
    """One tile while it runs, at the level where it is now. Used by one thread at a time.

    `norms`: where passes whose exchanges may be displaced keep their sums; None if all exchanges are waited for.
    """

    peers: Peers
    cut: Cut
    level: int = 0
    norms: NormMemory | None = None
    _scratch: dict[object, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.peers.rank

    @property
    def others(self) -> tuple[int, ...]:
        """Ranks of all other tiles."""
        return tuple(rank for rank in range(self.peers.count) if rank != self.peers.rank)

    @property
    def neighbors(self) -> tuple[int, ...]:
        return tuple(rank for rank in (self.rank - 1, self.rank + 1) if 0 <= rank < self.peers.count)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.peers.count - 1

    @property
    def begins(self) -> tuple[int, ...]:
        """Where each tile begins at the current level, and the end of the last."""
        return self.cut.begins(self.level)

    @property
    def span(self) -> tuple[int, int]:
        """This tile's first row and end at the current level."""
        return self.cut.span(self.rank, self.level)

    @property
    def height(self) -> int:
        """Rows of the whole at the current level."""
        return self.begins[-1]

    # tensors that live as long as the tile

    def shares_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Each tile's share of the rows at the current level, (R, 1)."""
        key = ("shares", self.level, dtype)
        if key not in self._scratch:
            begins = self.begins
            shares = [(end - start) / begins[-1] for start, end in pairwise(begins)]
            self._scratch[key] = torch.tensor(shares, dtype=dtype).unsqueeze(1).to(device)
        return self._scratch[key]

    def buffer(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialized tensor that is used again by the next layer that asks for the same. Never send it to other tiles."""
        key = (name, tuple(shape), like.dtype)
        if key not in self._scratch:
            self._scratch[key] = like.new_empty(tuple(shape))
        return self._scratch[key]


def swap(peers: Peers, outgoing: Mapping[int, Tensors]) -> Swaps[Received]:
    """Send to other tiles and wait for what they send."""
    return (yield peers.post(outgoing))
