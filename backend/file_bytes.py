"""An open file, from which tensors are read one at a time straight to where they stay: no map, whose pages would be faulted in one by one and which
ends the process if the file shrinks meanwhile.

A tensor that stays as it is stored, in main memory, is read in one piece into its own memory. One that changes its type or goes to another device
passes through a small buffer in blocks; to a card from page-locked memory, a block being copied while the next is read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, BinaryIO

import torch
from torch import Tensor

BLOCK_BYTES = 8 * 2**20
_CPU = torch.device("cpu")


class FileBytes:
    """The `length` bytes of an open file, which may be closed then. Nothing of it stays in memory. Thread-safe."""

    def __init__(self, stream: BinaryIO) -> None:
        self._descriptor: int | None = os.dup(stream.fileno())
        self.length = os.fstat(self._descriptor).st_size
        self._lock = threading.Lock()

    def bytes_at(self, start: int, end: int) -> bytes:
        data = bytearray(max(0, min(end, self.length) - start))
        self._fill(memoryview(data), start)
        return bytes(data)

    def read(
        self, start: int, shape: tuple[int, ...], stored: torch.dtype, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The numbers at byte `start` as a new tensor of `dtype` (None: as stored) on `device`. Raises: OSError if the file has become shorter."""
        device, dtype = torch.device(device), dtype or stored
        if device == _CPU and dtype == stored:
            tensor = torch.empty(shape, dtype=stored)
            self._fill(_bytes_of(tensor), start)
            return tensor
        flat = torch.empty(prod(shape), dtype=dtype, device=device)
        for first, block in self._blocks(start, len(flat), stored, device):
            flat[first : first + len(block)].copy_(block, non_blocking=block.is_pinned() if device.type == "cuda" else False)
        return flat.view(shape)

    def _blocks(self, start: int, count: int, stored: torch.dtype, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """(index of its first number, block) for all numbers. A block may be read until the next but one is asked for."""
        per_block = max(1, BLOCK_BYTES // stored.itemsize)
        buffers = _Buffers(min(per_block, count), stored, device)
        for first in range(0, count, per_block):
            block = buffers.next(min(per_block, count - first))
            self._fill(_bytes_of(block), start + first * stored.itemsize)
            yield first, block
        buffers.wait()

    def _fill(self, target: memoryview, start: int) -> None:
        """Read bytes from `start` on until `target` is full. Raises: OSError at the end of the file."""
        while len(target):
            num_read = self._read_into(target, start)
            if num_read == 0:
                raise OSError(f"the file ends at byte {start}; it has been cut short since it was opened")
            target, start = target[num_read:], start + num_read

    def _read_into(self, target: memoryview, start: int) -> int:
        assert self._descriptor is not None
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [target], start)
        with self._lock:  # Windows
            os.lseek(self._descriptor, start, os.SEEK_SET)
            data = os.read(self._descriptor, len(target))
        target[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    numbers: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(numbers) if tensor.numel() else memoryview(b"")


class _Buffers:
    """Two buffers in turn for a card, so that one is copied while the other is filled; one for other targets, whose copies have ended."""

    def __init__(self, count: int, stored: torch.dtype, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._memory = [torch.empty(count, dtype=stored, pin_memory=is_cuda) for _ in range(2 if is_cuda else 1)]
        self._mark: Callable[[], Any] | None = (lambda: torch.cuda.current_stream(device).record_event()) if is_cuda else None
        self._copied: list[Any] = [None] * len(self._memory)
        self._turn = 0

    def next(self, count: int) -> Tensor:
        """The next buffer, once the copy from it has ended."""
        if self._mark is not None:
            self._copied[self._turn - 1] = self._mark()
        self._turn = (self._turn + 1) % len(self._memory)
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()
        return self._memory[self._turn][:count]

    def wait(self) -> None:
        """Return when nothing is copied from the buffers any longer."""
        if self._mark is not None:
            self._mark().synchronize()
