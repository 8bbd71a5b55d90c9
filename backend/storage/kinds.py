"""Which kind of storage a tensor is: the one place that looks at a weight's type."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from backend.storage.base import Storage
from backend.storage.fp8 import MANTISSA_BITS, Fp8Storage
from backend.storage.packed import PackedStorage, PackedTensor
from backend.storage.plain import PlainStorage

KINDS: tuple[type[Storage], ...] = (PackedStorage, Fp8Storage, PlainStorage)
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


_EXTRA_BYTES = 5
"""Per number of a packed weight while it is dequantized: its code, and its product in fp32 where the format subtracts a minimum."""


def dequantizing_bytes(modules: Iterable[nn.Module], itemsize: int) -> int:
    """What dequantizing the largest packed weight of these modules takes besides the packed bytes: the weight in numbers of `itemsize` bytes, and
    what it is made from. 0 without packed weights."""
    sizes = [parameter.numel() for module in modules for parameter in module.parameters() if isinstance(parameter, PackedTensor)]
    return max(sizes, default=0) * (itemsize + _EXTRA_BYTES)


def is_compact(dtype: torch.dtype) -> bool:
    """Whether weights stored in `dtype` must be dequantized to compute."""
    return dtype in MANTISSA_BITS


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor is packed bytes with a format, so that no layer can use it as it is."""
    return isinstance(tensor, PackedTensor)


def has_packed_weights(module: nn.Module) -> bool:
    """Whether any weight of the module is packed."""
    return any(isinstance(parameter, PackedTensor) for parameter in module.parameters())


def describe_storage(module: nn.Module) -> str:
    """How most bytes of the module's weights are stored, for the log: "GGUF Q4_K", or "GGUF Q4_K and Q6_K" if both have a share of a tenth."""
    counts: dict[str, int] = {}
    for parameter in module.parameters():
        storage = storage_of(parameter)
        counts[storage.title] = counts.get(storage.title, 0) + storage.stored_bytes
    total = sum(counts.values())
    named = [title for title in sorted(counts, key=lambda title: -counts[title]) if counts[title] * 10 >= total][:3] or ["nothing"]
    first, *rest = named
    same_family = [title.removeprefix("GGUF ") if first.startswith("GGUF ") else title for title in rest]
    return " and ".join([first, *same_family])
