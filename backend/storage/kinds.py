"""Which kind of storage a tensor is: the one place that looks at a weight's type."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from backend.storage.base import Storage
from backend.storage.fp8 import MANTISSA_BITS, Fp8Storage
from backend.storage.plain import PlainStorage

KINDS: tuple[type[Storage], ...] = (Fp8Storage, PlainStorage)
"""Tried in this order. The last one accepts every tensor."""


def storage_of(tensor: Tensor) -> Storage:
    """The storage of a module's tensor."""
    for kind in KINDS:
        if kind.holds(tensor):
            return kind(tensor)
    raise TypeError(f"No kind of storage accepts a tensor of type {tensor.dtype}.")


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes in memory of all the tensors."""
    return sum(storage_of(tensor).stored_bytes for tensor in tensors)


def module_stored_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes in memory of the parameters of these modules."""
    return sum(stored_bytes(module.parameters()) for module in modules)


def is_compact(dtype: torch.dtype) -> bool:
    """Whether weights stored in `dtype` must be dequantized to compute."""
    return dtype in MANTISSA_BITS
