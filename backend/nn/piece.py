"""The name of a placeable run of layers: a segment of a program, or a part of one. Holds no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """What is placed as one: a segment of the program, or a run of its transformer's blocks.

    `segment` is the position in `Program.segments`. A piece that begins at block 0 also has what runs before the blocks (the resnet, the
    transformer's projection in), one that ends at None also what runs after them (projection out, further layers).
    """

    segment: int
    first_block: int = 0
    end_block: int | None = None

    @property
    def is_whole(self) -> bool:
        return self.first_block == 0 and self.end_block is None

    def __str__(self) -> str:
        return str(self.segment) if self.is_whole else f"{self.segment}[{self.first_block}:{'' if self.end_block is None else self.end_block}]"
