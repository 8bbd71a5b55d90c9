"""Reads the shape of a network from the tensors of one part of a file. Names and shapes only; errors name the file and the tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Part

ORIGINAL_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.", "")
DIFFUSERS_PREFIXES = ("transformer.", "model.diffusion_model.", "")


@dataclass(frozen=True, slots=True)
class FileShapes:
    """`shapes` are those of the part's tensors, by their names without the prefix. `title` names the model in messages."""

    file: TensorFile
    part: Part
    title: str
    shapes: Mapping[str, tuple[int, ...]]

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def find(self, name: str, num_dims: int = 2) -> tuple[int, ...]:
        """The shape of a tensor. Raises: CheckpointError if it is missing, has another number of dimensions, or none of its numbers."""
        shape = self.shapes.get(name)
        if shape is None:
            raise CheckpointError(
                f"{self.file.path.name}: looks like {self.title}, but lacks {self.part.prefix}{name}. The file is incomplete: download it again, or "
                "convert it again from its source."
            )
        if len(shape) != num_dims or not all(shape):
            raise CheckpointError(
                f"{self.file.path.name}: {self.part.prefix}{name} has the shape {'x'.join(map(str, shape)) or 'of a number'}, which no {self.title} "
                "has. The file is damaged; download it again."
            )
        return shape

    def has_any(self, *starts: str) -> bool:
        """Whether there is a tensor whose name begins with one of these."""
        return any(name.startswith(starts) for name in self.shapes)

    def count_blocks(self, start: str) -> int:
        """Number of consecutive blocks ("blocks.0.", "blocks.1." ...), from 0."""
        numbers = {name.removeprefix(start).partition(".")[0] for name in self.shapes if name.startswith(start)}
        count = 0
        while str(count) in numbers:
            count += 1
        return count

    def refuse(self, what: str) -> CheckpointError:
        """An error for a shape that no such model has."""
        return CheckpointError(
            f"{self.file.path.name}: looks like {self.title}, but has {what}. No such model is known; check that you downloaded the right file."
        )


def read_part(file: TensorFile, part: Part, title: str) -> FileShapes:
    """The shapes of the tensors below the part's prefix."""
    start = len(part.prefix)
    return FileShapes(file, part, title, {key[start:]: info.shape for key, info in file.infos.items() if key.startswith(part.prefix)})
