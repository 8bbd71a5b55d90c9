"""The name of a placeable run of layers: a segment of a program, or part of one. Contains no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """The smallest thing to place: a segment of the program, or a run of its transformer's blocks.

    `segment` is the position in `Program.segments`. A piece that begins at block 0 includes what runs before the blocks (the resnet, the
    transformer's input projection); one that ends at None includes what runs after them (output projection, further layers).
    """

    segment: int
    first_block: int = 0
    end_block: int | None = None

    @property
    def is_whole(self) -> bool:
        return self.first_block == 0 and self.end_block is None

    def __str__(self) -> str:
        return str(self.segment) if self.is_whole else f"{self.segment}[{self.first_block}:{'' if self.end_block is None else self.end_block}]"
