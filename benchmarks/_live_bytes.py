"""Counts the bytes of simultaneously live tensors for networks on the meta device: full-size shapes without memory and work."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active, `peak_bytes` is the peak of tensors created inside. Attention counts as a fused kernel, with only its result."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, torch.Tensor):
                self._note(given, counts=False)
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self._note(made, counts=True)
        return result

    def _note(self, tensor: torch.Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        if counts:
            num_bytes = storage.nbytes()
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._drop, num_bytes).atexit = False

    def _drop(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


def _fused_attention(query: torch.Tensor, *others: Any, **settings: Any) -> torch.Tensor:
    return torch.empty_like(query)


@contextmanager
def count_live_bytes() -> Iterator[LiveBytes]:
    counter = LiveBytes()
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused_attention), counter:
        yield counter
