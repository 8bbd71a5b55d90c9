"""A file behind a read-only memory map, from which tensors are copied one at a time; the pages of each are released at once."""

from __future__ import annotations

import mmap
import warnings
from math import prod
from typing import BinaryIO

import torch
from torch import Tensor


class MappedFile:
    """The `length` bytes of an open file, which may be closed then. Nothing of it stays in memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.length = len(self._map)

    def bytes_at(self, start: int, end: int) -> bytes:
        return self._map[start:end]

    def read(
        self, start: int, shape: tuple[int, ...], stored: torch.dtype, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The numbers at byte `start` as a new tensor of `dtype` (None: as stored) on `device`."""
        num_bytes = prod(shape) * stored.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype or stored, device=device)
        tensor = self._view(start, shape, stored).to(device=device, dtype=dtype or stored, copy=True)
        self._give_back(start, num_bytes)
        return tensor

    def _view(self, start: int, shape: tuple[int, ...], stored: torch.dtype) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nothing writes to it
            if start % stored.itemsize:  # old writers did not align the data, but a tensor must be aligned
                num_bytes = prod(shape) * stored.itemsize
                return torch.frombuffer(self._map, dtype=torch.uint8, count=num_bytes, offset=start).clone().view(stored).reshape(shape)
            return torch.frombuffer(self._map, dtype=stored, count=prod(shape), offset=start).reshape(shape)

    def _give_back(self, start: int, num_bytes: int) -> None:
        """Release the tensor's pages from this process; they are clean copies of the file."""
        if not hasattr(mmap, "MADV_DONTNEED"):  # Windows does this by itself
            return
        page_start = start - start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, page_start, start + num_bytes - page_start)

    def close(self) -> None:
        self._map.close()
