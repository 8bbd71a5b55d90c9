"""Packed weights: one buffer of bytes and a format that reads it. Scaled fp8, GGUF's types, NF4, FP4 and scaled int8 are formats.

A `PackedTensor` is a tensor like any other to modules, replicas and streaming: it has the weight's shape and moves between devices as the bytes it
has. It cannot be computed with; layers get the dequantized weight while they run (`running`).

Shapes: O rows of a weight, N bytes of a buffer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from backend.storage.base import Storage

FormatT = TypeVar("FormatT", bound="PackedFormat")


class PackedFormatError(ValueError):
    """What was asked of a packed weight is not possible in its format."""


class PackedFormat(ABC):
    """How the bytes of one weight are read: a frozen, hashable value without tensors.

    Buffers are uint8 (N,), contiguous, on any device, the meta device included. Nothing here reads a number back to the host.
    """

    __slots__ = ()

    shape: tuple[int, ...]
    can_quantize = True
    """Whether `quantize` works. Some of GGUF's types have no quantizer."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Its name for users: "GGUF Q4_K"."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Length of the buffer."""

    @abstractmethod
    def dequantize(self, buffer_N: Tensor, out_dtype: torch.dtype) -> Tensor:
        """The weight in `out_dtype`, computed in fp32 and rounded once."""

    def quantize(self, value: Tensor, *, seed: int, near_N: Tensor | None = None) -> Tensor:
        """The buffer of a weight (fp32, of `shape`). `near_N`: the buffer it replaces, whose scales are kept where they fit.

        Raises: PackedFormatError if the format has no quantizer.
        """
        raise PackedFormatError(f"Weights cannot be converted to {self.title}. Use a format that has a quantizer, or leave the weight as it is.")

    @abstractmethod
    def cut(self: FormatT, first: int, end: int) -> FormatT:
        """The format of rows [`first`, `end`). Raises: PackedFormatError if a block of numbers crosses that border."""

    @abstractmethod
    def rows(self, buffer_N: Tensor, first: int, end: int) -> Tensor:
        """The buffer of rows [`first`, `end`), to be read by `cut`'s format. Raises: PackedFormatError like `cut`."""

    def take_rows(self: FormatT, buffer_N: Tensor, indices_R: Tensor) -> tuple[FormatT, Tensor]:
        """Format and buffer of rows in the order of `indices_R`. Raises: PackedFormatError like `cut`."""
        raise PackedFormatError(f"Single rows of {self.title} are not read.")

    @abstractmethod
    def concat(self: FormatT, others: Sequence[tuple[FormatT, Tensor]]) -> tuple[FormatT, Tensor]:
        """Format and buffer of weights stacked along rows; `others` are all parts. Raises: PackedFormatError if they do not fit together."""

    @abstractmethod
    def reshaped(self: FormatT, shape: tuple[int, ...]) -> FormatT:
        """The same bytes as a weight of another shape with as many numbers and rows."""


class PackedTensor(torch.Tensor):
    """A weight in packed form. `shape` is the weight's and `dtype` is uint8, so that casts to a computation dtype leave it alone."""

    buffer: Tensor
    format: PackedFormat

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own subclasses do

    @staticmethod
    def __new__(cls, buffer: Tensor, format: PackedFormat) -> PackedTensor:
        if buffer.dtype != torch.uint8 or tuple(buffer.shape) != (format.num_bytes,):
            raise PackedFormatError(
                f"A weight of shape {format.shape} in {format.title} takes {format.num_bytes} bytes, but {tuple(buffer.shape)} of type "
                f"{buffer.dtype} were given. The file it was read from is damaged."
            )
        self: PackedTensor = torch.Tensor._make_wrapper_subclass(cls, format.shape, dtype=torch.uint8, device=buffer.device)
        self.buffer, self.format = buffer, format
        return self

    def __init__(self, *args: object) -> None:
        """Does nothing: torch creates the object in `__new__`."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without func and as no class method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            raise NotImplementedError(
                f"{func} needs numbers, but this weight is stored in {_first_packed(args).format.title}. Use storage_of(weight).dequantize(dtype)."
            )
        return handler(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        """How `Module.to` moves a parameter that stays the same object."""
        if not isinstance(value, PackedTensor):
            raise RuntimeError(
                f"The data of a weight stored in {self.format.title} was set to a plain tensor. Give its layer another parameter instead."
            )
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.buffer, self.format = value.buffer, value.format

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = PackedTensor(self.buffer.detach().clone(), self.format)
            memo[id(self)] = torch.nn.Parameter(copied, requires_grad=False) if isinstance(self, torch.nn.Parameter) else copied
        found: Tensor = memo[id(self)]
        return found

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedTensor({self.format.title}, shape={tuple(self.shape)}, device={self.device})"


def empty_packed(format: PackedFormat, device: torch.device | str = "meta") -> PackedTensor:
    """A weight without numbers: on the meta device it takes no memory and still counts its bytes."""
    return PackedTensor(torch.empty(format.num_bytes, dtype=torch.uint8, device=device), format)


def reshape_packed(tensor: PackedTensor, shape: tuple[int, ...]) -> PackedTensor:
    """The same bytes as a weight of another shape."""
    return tensor if tuple(tensor.shape) == shape else PackedTensor(tensor.buffer, tensor.format.reshaped(shape))


def can_cut(format: PackedFormat, first: int, end: int) -> bool:
    """Whether rows can be cut out without quantizing again."""
    try:
        format.cut(first, end)
    except PackedFormatError:
        return False
    return True


def say_misfit(format: PackedFormat, shape: tuple[int, ...]) -> str:
    """For the error of `reshaped`."""
    return f"A weight of shape {format.shape} in {format.title} cannot have the shape {shape}."


def has_same_rows(format: PackedFormat, shape: tuple[int, ...]) -> bool:
    """Whether a weight of `shape` has as many numbers and rows."""
    return prod(shape) == prod(format.shape) and shape[:1] == tuple(format.shape[:1])


# operations


def _first_packed(args: Sequence[Any]) -> PackedTensor:
    flat = [one for arg in args for one in (arg if isinstance(arg, (list, tuple)) else [arg])]
    return next(one for one in flat if isinstance(one, PackedTensor))


def _share(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PackedTensor:
    """`detach`: another tensor with the same bytes."""
    return PackedTensor(args[0].buffer.detach(), args[0].format)


def _clone(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PackedTensor:
    return PackedTensor(args[0].buffer.clone(), args[0].format)


def _move(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PackedTensor:
    """`_to_copy`: the bytes on another device. There is no other dtype to cast to."""
    tensor, dtype = args[0], kwargs.get("dtype")
    if dtype not in (None, torch.uint8):
        raise NotImplementedError(f"A weight stored in {tensor.format.title} cannot be cast to {dtype}. Use storage_of(weight).dequantize(dtype).")
    device = kwargs.get("device") or tensor.buffer.device
    moved = tensor.buffer.to(device, non_blocking=bool(kwargs.get("non_blocking")), copy=True)
    return PackedTensor(moved.pin_memory() if kwargs.get("pin_memory") else moved, tensor.format)


def _empty_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PackedTensor:
    return empty_packed(args[0].format, kwargs.get("device") or args[0].buffer.device)


def _copy_into(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PackedTensor:
    target, source = args[:2]
    if not isinstance(target, PackedTensor) or not isinstance(source, PackedTensor) or target.format != source.format:
        names = " to ".join(one.format.title if isinstance(one, PackedTensor) else str(one.dtype) for one in (source, target))
        raise PackedFormatError(f"Weights are copied only between equal formats, not from {names} of shape {tuple(target.shape)}.")
    target.buffer.copy_(source.buffer, non_blocking=len(args) > 2 and bool(args[2]))
    return target


def _pin(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PackedTensor:
    return PackedTensor(args[0].buffer.pin_memory(), args[0].format)


def _is_pinned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(args[0].buffer.is_pinned())


def _record_stream(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    args[0].buffer.record_stream(args[1])


def _decompose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In inference mode composite operations arrive whole, including those that end in `_to_copy`."""
    return func.decompose(*args, **kwargs)


_aten = torch.ops.aten
_Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_HANDLERS: dict[Any, _Handler] = {
    _aten.detach.default: _share,
    _aten.alias.default: _share,
    _aten.contiguous.default: _share,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _move,
    _aten.to.device: _decompose,
    _aten.to.dtype: _decompose,
    _aten.to.dtype_layout: _decompose,
    _aten.to.other: _decompose,
    _aten.empty_like.default: _empty_like,
    _aten.copy_.default: _copy_into,
    _aten._pin_memory.default: _pin,
    _aten.pin_memory.default: _pin,
    _aten.is_pinned.default: _is_pinned,
    _aten.record_stream.default: _record_stream,
}


class PackedStorage(Storage):
    """The storage of a `PackedTensor`."""

    __slots__ = ()

    tensor: PackedTensor

    @classmethod
    def holds(cls, tensor: Tensor) -> bool:
        return isinstance(tensor, PackedTensor)

    @property
    def format(self) -> PackedFormat:
        return self.tensor.format

    @property
    def title(self) -> str:
        return self.format.title

    @property
    def stored_bytes(self) -> int:
        return self.format.num_bytes

    @property
    def is_packed(self) -> bool:
        return True

    @property
    def can_requantize(self) -> bool:
        return self.format.can_quantize

    def dequantize(self, out_dtype: torch.dtype, *, copy: bool = False) -> Tensor:
        return self.format.dequantize(self.tensor.buffer, out_dtype)

    def computes_in(self, dtype: torch.dtype) -> bool:
        return False

    def run_dtype(self, computation_dtype: torch.dtype) -> torch.dtype:
        return computation_dtype

    def requantize(self, value: Tensor, *, seed: int) -> PackedStorage:
        buffer = self.format.quantize(value.to(self.device), seed=seed, near_N=self.tensor.buffer)
        return PackedStorage(PackedTensor(buffer, self.format))

    def look_up(self, indices: Tensor, out_dtype: torch.dtype) -> Tensor:
        try:
            format_of_rows, buffer = self.format.take_rows(self.tensor.buffer, indices)
        except PackedFormatError:  # blocks cross rows
            return super().look_up(indices, out_dtype)
        return format_of_rows.dequantize(buffer, out_dtype)

    def is_same(self, other: Storage) -> bool:
        return isinstance(other, PackedStorage) and self.format == other.format and torch.equal(self.tensor.buffer, other.tensor.buffer)

    def rows(self, first: int, end: int) -> PackedStorage:
        return PackedStorage(PackedTensor(self.format.rows(self.tensor.buffer, first, end), self.format.cut(first, end)))

    @classmethod
    def concat(cls, parts: Sequence[PackedStorage]) -> PackedStorage:
        form, buffer = parts[0].format.concat([(part.format, part.tensor.buffer) for part in parts])
        return PackedStorage(PackedTensor(buffer, form))

    def to(self, device: torch.device, *, copy: bool = False) -> PackedStorage:
        return PackedStorage(PackedTensor(self.tensor.buffer.detach().to(device, copy=copy), self.format))

    def to_host(self) -> PackedStorage:
        buffer = self.tensor.buffer.detach()
        if buffer.device.type == "cuda":
            return PackedStorage(PackedTensor(torch.empty(buffer.shape, dtype=torch.uint8, pin_memory=True).copy_(buffer), self.format))
        return self.to(torch.device("cpu"), copy=True)
