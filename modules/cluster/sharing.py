"""Divides the pictures of one request over workers by their speed. Pure.

A picture depends on its own seed, prompt and settings alone, so a piece is a range of the request's pictures with the very seeds that they have
in it. Whole batches stay together where there are several: a batch of another size may differ in the last bit of its sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Pictures `first` to `first + count - 1` of a request, as batches of at most `batch_size`."""

    first: int
    count: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.first < 0 or self.count < 1 or not 1 <= self.batch_size <= self.count:
            raise ValueError(f"a piece of {self.count} pictures from {self.first} in batches of {self.batch_size} cannot be")

    @property
    def num_batches(self) -> int:
        return -(-self.count // self.batch_size)


def share_pictures(*, batch_size: int, num_batches: int, speeds: Sequence[float]) -> list[Piece | None]:
    """A piece for each worker of these speeds; None for one that would slow the others down.

    For example 4 batches of 2 for speeds 3 and 1 are pieces of 6 and 2 pictures.
    """
    if not speeds:
        raise ValueError("pictures cannot be shared by no workers")
    unit = batch_size if num_batches > 1 else 1  # a single batch has to be split
    counts = share_units(num_batches if num_batches > 1 else batch_size, speeds)
    pieces: list[Piece | None] = []
    first = 0
    for count in counts:
        pieces.append(Piece(first=first, count=count * unit, batch_size=min(batch_size, count * unit)) if count else None)
        first += count * unit
    return pieces


def share_units(num_units: int, speeds: Sequence[float]) -> list[int]:
    """How many of `num_units` equal parts each worker gets so that the last one ends as early as possible; ties go to the first.

    Each part goes to the worker that would end it first, which is the optimum for equal parts. Speeds must be above 0.
    """
    if min(speeds) <= 0:
        raise ValueError(f"speeds must be above 0, got {list(speeds)}")
    counts = [0] * len(speeds)
    for _ in range(num_units):
        ends = [(count + 1) / speed for count, speed in zip(counts, speeds)]
        counts[ends.index(min(ends))] += 1
    return counts


def choose_num_workers(*, num_units: int, num_idle: int, num_waiting: int) -> int:
    """Over how many workers to spread a request now: idle ones that no other job waits for, and no more than it has parts."""
    return max(1, min(num_units, num_idle - num_waiting))
