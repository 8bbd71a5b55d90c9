"""What an open file of tensors promises, whatever its kind, and the error that every kind raises. Does not open anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from backend.storage.packed import PackedFormat

_SHAPE_ERRORS = (ArithmeticError, AssertionError, LookupError, StopIteration, TypeError, ValueError)
REPEAT_DOWNLOAD = "Download it again and compare its size with the one on the model's page."


class CheckpointError(Exception):
    """A model file cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and stored dtype of one tensor. A weight with a `packed` format has the shape that layers compute with and the dtype uint8."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    packed: PackedFormat | None = None

    @property
    def stored_bytes(self) -> int:
        return self.packed.num_bytes if self.packed is not None else prod(self.shape) * self.dtype.itemsize


class TensorFile(Protocol):
    """An open file of tensors. `infos` is complete at once; reading costs only the tensor that is read."""

    path: Path
    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def read(self, key: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor (or its rows from, to) that shares no memory with the file, as `dtype` on `device`. None: as stored, a packed weight as fp32."""
        ...

    def read_stored(self, key: str, *, device: torch.device | str = "cpu", rows: tuple[int, int] | None = None) -> Tensor:
        """Like `read`, but a packed weight stays packed (`PackedTensor`)."""
        ...

    def close(self) -> None: ...


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the system's errors into a CheckpointError that names the file."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CheckpointError(f"{path.name}: cannot be read from {path.parent}: {reason}. Check that it exists and is readable.") from error


@contextlib.contextmanager
def refusing_odd_shapes(*files: TensorFile) -> Iterator[None]:
    """What reading a network's structure from names and shapes raises for those that no network has (a bias as a matrix, a width of 0) becomes a
    CheckpointError that names the files. Not for code that computes: there, such an error is a bug.

    Raises: CheckpointError.
    """
    try:
        yield
    except _SHAPE_ERRORS as error:
        names = " with ".join(file.path.name for file in files)
        raise CheckpointError(
            f"{names}: the shapes of its tensors fit no known network ({type(error).__name__}: {error}). The file is damaged: {REPEAT_DOWNLOAD}"
        ) from error


def say_mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
