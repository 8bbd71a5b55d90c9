"""Storage: one weight as it is stored in memory, and the operations on it. Must not know networks, layers or files.

Shapes: rows are the first dim, as in a linear layer's weight (outputs, inputs).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

StorageT = TypeVar("StorageT", bound="Storage")


class Storage(ABC):
    """A weight in memory. `tensor` is the module's parameter; `dequantize` returns its values.

    A kind with packed parameters (fewer bytes than the numbers would take) also overrides `shape` and `stored_bytes`.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    @abstractmethod
    def holds(cls, tensor: Tensor) -> bool:
        """Whether a module's tensor is of this kind."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight that the layer computes with."""
        return self.tensor.shape

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def stored_bytes(self) -> int:
        """Bytes in memory."""
        return self.tensor.nbytes

    @property
    def title(self) -> str:
        """The kind's name for users: "float16", "GGUF Q4_K"."""
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def is_packed(self) -> bool:
        """Whether the tensor is packed bytes, which change only as a whole."""
        return False

    @property
    def can_requantize(self) -> bool:
        """Whether changed values can be stored as this kind again."""
        return True

    # values

    @abstractmethod
    def dequantize(self, out_dtype: torch.dtype, *, copy: bool = False) -> Tensor:
        """The values in `out_dtype` on the weight's device; with `copy` always a new tensor."""

    def computes_in(self, dtype: torch.dtype) -> bool:
        """Whether a layer that computes in `dtype` can use the stored tensor as it is."""
        return self.tensor.dtype == dtype

    @abstractmethod
    def run_dtype(self, computation_dtype: torch.dtype) -> torch.dtype:
        """The dtype of the weight that a layer which computes in `computation_dtype` gets."""

    @abstractmethod
    def requantize(self: StorageT, value: Tensor, *, seed: int) -> StorageT:
        """`value` (fp32, any device) stored as this kind, on its own device. `seed` is for kinds that round at random: equal seeds, equal weights."""

    def overwrite(self, value: Tensor, *, seed: int) -> None:
        """Write `value` (fp32, any device) into this memory, so that pinned memory and other references to the weight stay valid."""
        self.copy_from(self.requantize(value, seed=seed))

    def copy_from(self: StorageT, other: StorageT) -> None:
        """Copy another weight of this kind and shape, bit for bit, into this memory."""
        with torch.inference_mode(self.tensor.is_inference()), torch.no_grad():
            self.tensor.copy_(other.tensor)

    def is_same(self, other: Storage) -> bool:
        """Whether the other weight is stored in the same way with the same bits."""
        if type(other) is not type(self) or self.tensor.dtype != other.tensor.dtype or self.shape != other.shape:
            return False
        return torch.equal(_bits(self.tensor), _bits(other.tensor))

    # rows

    def rows(self: StorageT, first: int, end: int) -> StorageT:
        """Rows [`first`, `end`), as a view."""
        return type(self)(self.tensor[first:end])

    def look_up(self, indices: Tensor, out_dtype: torch.dtype) -> Tensor:
        """The values of rows in the order of `indices`."""
        return self.dequantize(out_dtype)[indices]

    @classmethod
    def concat(cls: type[StorageT], parts: Sequence[StorageT]) -> StorageT:
        """Weights of one kind stacked along rows (q, k and v to one fused matrix)."""
        return cls(torch.cat([part.tensor for part in parts]))

    # places

    def to(self: StorageT, device: torch.device, *, copy: bool = False) -> StorageT:
        """The weight on `device`, as it is stored; with `copy` always in new memory."""
        return type(self)(self.tensor.detach().to(device, copy=copy))

    def to_host(self: StorageT) -> StorageT:
        """A new copy on the host, page-locked for a weight on a CUDA device."""
        if self.device.type == "cuda":
            return type(self)(torch.empty(self.tensor.shape, dtype=self.tensor.dtype, pin_memory=True).copy_(self.tensor))
        return self.to(torch.device("cpu"), copy=True)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
