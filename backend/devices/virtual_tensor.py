"""The tensor of a virtual GPU, and how torch's operations run on it. `virtual_gpu` explains its purpose and installs it.

A `VirtualTensor` reports a device "vgpu:N" and wraps the CPU tensor with the numbers. Operations arrive in `__torch_dispatch__` and run on the
CPU tensors; operations without tensors (`torch.empty(..., device="vgpu:0")`) arrive in `run_factory`. Both end in `_run_on_device`; the few
operations that may involve two devices have their own handlers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._mode_utils import no_dispatch

from backend.devices.slot import canonical_device
from backend.devices.virtual_device import CopyCounter, VirtualDevice

copies = CopyCounter()
devices: list[VirtualDevice] = []
"""The virtual GPUs by index; `virtual_gpu.install` fills it."""


class HostReadError(RuntimeError):
    """Something made the host wait for a device while that was refused."""


class HostReads:
    """Whether operations that make the host wait for a device are refused, in all threads."""

    refused = False

    def check(self, what: str) -> None:
        """Raises: HostReadError while they are refused."""
        if self.refused:
            raise HostReadError(
                f"{what} makes the host wait for the device, which is refused here. Keep the value on the device, or know it on the host."
            )


host_reads = HostReads()

_CPU = torch.device("cpu")
_MAY_HOLD_TENSORS = (torch.Tensor, list, tuple)
_charges: dict[int, weakref.ref[_Charge]] = {}
"""The charges, by address of the CPU storage."""


class _Charge:
    """The bytes of one CPU storage on one virtual GPU, shared by all tensors that view the storage and released with the last of them."""

    __slots__ = ("__weakref__", "address", "device", "need_bytes", "storage")

    def __init__(self, device: VirtualDevice, storage: torch.UntypedStorage, address: int) -> None:
        self.need_bytes = 0
        need_bytes = storage.nbytes()
        device.charge(need_bytes)
        self.device, self.storage, self.address, self.need_bytes = device, storage, address, need_bytes
        _charges[address] = weakref.ref(self)

    def __del__(self) -> None:
        if self.need_bytes:
            _charges.pop(self.address, None)
            self.device.release(self.need_bytes)


def _find_charge(device: VirtualDevice, cpu_tensor: torch.Tensor) -> _Charge:
    """The charge of the tensor's storage, shared or new. Raises: torch.OutOfMemoryError."""
    storage = cpu_tensor.untyped_storage()
    address: int = storage._cdata
    known = _charges.get(address)
    charge = known() if known is not None else None
    return charge if charge is not None else _Charge(device, storage, address)


class VirtualTensor(torch.Tensor):
    """A tensor on a virtual GPU."""

    cpu_tensor: torch.Tensor
    virtual_device: VirtualDevice
    charge: _Charge

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own subclasses do

    @staticmethod
    def __new__(cls, cpu_tensor: torch.Tensor, device: torch.device, virtual_device: VirtualDevice) -> VirtualTensor:
        charge = _find_charge(virtual_device, cpu_tensor)
        self: VirtualTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            cpu_tensor.shape,
            strides=cpu_tensor.stride(),
            storage_offset=cpu_tensor.storage_offset(),
            dtype=cpu_tensor.dtype,
            device=device,
        )
        self.cpu_tensor, self.virtual_device, self.charge = cpu_tensor, virtual_device, charge
        return self

    def __init__(self, *args: object) -> None:
        """Does nothing: torch creates the object in `__new__`."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without func and as no class method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _HANDLERS.get(func, _run_on_device)(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, VirtualTensor):
            raise RuntimeError(f"The data of a tensor on {self.device} was set to a tensor on {value.device}. Use .to() to move it instead.")
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.cpu_tensor, self.virtual_device, self.charge = value.cpu_tensor, value.virtual_device, value.charge

    def __deepcopy__(self, memo: dict[int, Any]) -> VirtualTensor:
        if id(self) not in memo:
            with torch.no_grad():
                copied = self.detach().clone()
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        found: VirtualTensor = memo[id(self)]
        return found

    def tolist(self) -> Any:
        host_reads.check(".tolist()")
        return self.cpu_tensor.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.cpu_tensor!r} on {self.device}"

    def __format__(self, spec: str) -> str:
        return format(self.cpu_tensor, spec)


# running


class _Unwrapping:
    """Extracts the CPU tensors from an operation's arguments, and checks that all are on one device."""

    __slots__ = ("by_cpu_tensor", "cpu_only", "device", "virtual_device")

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.virtual_device: VirtualDevice | None = None
        self.by_cpu_tensor: dict[int, VirtualTensor] = {}
        self.cpu_only: torch.Tensor | None = None

    def take(self, value: Any) -> Any:
        if isinstance(value, VirtualTensor):
            if self.virtual_device is None:
                self.device, self.virtual_device = value.device, value.virtual_device
            elif self.virtual_device is not value.virtual_device:
                raise _mixed(self.device, value.device)
            cpu_tensor = value.cpu_tensor
            self.by_cpu_tensor[id(cpu_tensor)] = value
            return cpu_tensor
        if isinstance(value, torch.Tensor):
            if value.dim() > 0:
                self.cpu_only = value
            return value
        if type(value) is list or type(value) is tuple:
            return type(value)([self.take(one) for one in value])
        return value


def _mixed(one: torch.device | None, other: torch.device | None) -> RuntimeError:
    return RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {one} and {other}!")


def _run_on_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation whose tensors are all on one device. Its results are on the same device unless `device=` names another.

    A 0-dim CPU tensor counts as a number, which torch accepts on any device.
    """
    found = _Unwrapping()
    take = found.take
    cpu_args = [take(arg) if isinstance(arg, _MAY_HOLD_TENSORS) else arg for arg in args]
    cpu_kwargs = {name: take(value) for name, value in kwargs.items()} if kwargs else kwargs
    device, virtual_device = found.device, found.virtual_device
    if found.cpu_only is not None and virtual_device is not None:
        raise _mixed(device, found.cpu_only.device)
    if kwargs.get("device") is not None:
        device = canonical_device(kwargs["device"])
        virtual_device = _virtual_device_of(device)
        cpu_kwargs["device"] = device if device.type == "meta" else _CPU
    if kwargs.get("pin_memory"):
        cpu_kwargs["pin_memory"] = False
    if device is None or virtual_device is None:
        return func(*cpu_args, **cpu_kwargs)
    virtual_device.begin_operation()
    return _wrap(func(*cpu_args, **cpu_kwargs), device, virtual_device, found.by_cpu_tensor)


def _wrap(result: Any, device: torch.device, virtual_device: VirtualDevice, known: dict[int, VirtualTensor]) -> Any:
    """Results as tensors on the device. A result that is one of the arguments is returned as that argument."""
    if isinstance(result, torch.Tensor):
        same = known.get(id(result))
        return same if same is not None else VirtualTensor(result, device, virtual_device)
    if isinstance(result, (list, tuple)):
        return type(result)([_wrap(one, device, virtual_device, known) for one in result])
    return result


def _virtual_device_of(device: torch.device) -> VirtualDevice | None:
    """The virtual GPU that a device names; None for other kinds. Raises: RuntimeError if it does not exist."""
    if device.type in ("cpu", "meta"):
        return None
    index = device.index or 0
    if index >= len(devices):
        raise RuntimeError(f"{device} does not exist; there are {len(devices)} virtual GPUs. Name more with --virtual-gpus.")
    return devices[index]


def run_factory(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation without tensor arguments that creates a tensor on a virtual GPU."""
    return _run_on_device(func, args, kwargs)


def make_whole_kernel(func: Any) -> Callable[..., Any]:
    """A kernel that runs a composite operation whole, so that it uses the CPU's own implementation."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            return func.decompose(*args, **kwargs)
        return _run_on_device(func, args, kwargs)

    return kernel


# operations that may see two devices, or change a tensor's shape in place


def _record_copy(source: torch.Tensor, target: torch.device, target_virtual: VirtualDevice | None) -> None:
    """Count copied bytes, wait for a slow link, and fail on a lost device."""
    source_virtual = source.virtual_device if isinstance(source, VirtualTensor) else None
    crosses = source_virtual is not target_virtual
    for virtual_device in {id(one): one for one in (source_virtual, target_virtual) if one is not None}.values():
        virtual_device.begin_operation()
        if crosses:
            virtual_device.delay_copy(source.nbytes)
    if crosses:
        copies.add(str(source.device), str(target), source.nbytes)


def _cpu_tensor_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu_tensor if isinstance(tensor, VirtualTensor) else tensor


def _copy_into(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """`target.copy_(source)` in any direction."""
    target: torch.Tensor = args[0]
    source: torch.Tensor = args[1]
    if isinstance(source, VirtualTensor) and not isinstance(target, VirtualTensor):
        host_reads.check("copying to the host")
    _record_copy(source, target.device, target.virtual_device if isinstance(target, VirtualTensor) else None)
    _cpu_tensor_of(target).copy_(_cpu_tensor_of(source))
    return target


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`target.copy_(source)` inside `torch.tensor(..., device=)`, where torch bypasses `__torch_dispatch__`."""
    host_reads.check("torch.tensor(..., device=)")
    return _copy_into(None, (target, source), {})


def _convert(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`_to_copy`: a copy of a tensor with another dtype, on another device, or both."""
    source: VirtualTensor = args[0]
    target = canonical_device(kwargs["device"]) if kwargs.get("device") is not None else source.device
    virtual_device = source.virtual_device if target == source.device else _virtual_device_of(target)
    if target.type == "cpu":
        host_reads.check("copying to the host")
    _record_copy(source, target, virtual_device)
    cpu_kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory", "non_blocking")}
    if target.type == "meta":
        return func(source.cpu_tensor, **cpu_kwargs, device=target)
    copied = func(source.cpu_tensor, **cpu_kwargs)
    return copied if virtual_device is None else VirtualTensor(copied, target, virtual_device)


def _detach(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor:
    """Another tensor with the same storage. Works even on a lost device, because it runs nothing there."""
    source: VirtualTensor = args[0]
    return VirtualTensor(source.cpu_tensor.detach(), source.device, source.virtual_device)


def _decompose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Decompose an operation. In inference mode composite operations arrive whole, including those that end in `_to_copy`."""
    return func.decompose(*args, **kwargs)


def _index(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Indexing: indices may be on the CPU; the indexed tensor and assigned values may not."""
    indexed, indices, rest = args[0], args[1], args[2:]
    if not isinstance(indexed, VirtualTensor):
        raise RuntimeError(f"Indices should be either on {indexed.device} or on the CPU: the indexed tensor is on {indexed.device}.")
    if any(isinstance(index, VirtualTensor) and index.dtype == torch.bool for index in indices):
        host_reads.check("indexing by a mask")
    on_device = [None if index is None else index.to(indexed.device) for index in indices]
    return _run_on_device(func, (indexed, on_device, *rest), kwargs)


def _read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operations whose result, or the shape of whose result, depends on numbers on the device: a real device is waited for."""
    host_reads.check(str(func))
    return _run_on_device(func, args, kwargs)


def _change_shape_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`unsqueeze_` and similar operations also change the shape that torch has stored for the wrapper."""
    func(args[0].cpu_tensor, *args[1:], **kwargs)
    with no_dispatch():
        func(*args, **kwargs)
    return args[0]


def _refuse(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise NotImplementedError(f"{func} is not possible on a virtual GPU. Create a new tensor instead of changing this one's storage.")


def _is_same_kind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `one.data = other` could work."""
    return isinstance(args[0], VirtualTensor) and isinstance(args[1], VirtualTensor)


def _is_not_pinned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return False


def _do_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


_aten = torch.ops.aten
_Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_OVERLOADS_BY_HANDLER: dict[_Handler, tuple[Any, ...]] = {
    _copy_into: (_aten.copy_.default,),
    _convert: (_aten._to_copy.default,),
    _detach: (_aten.detach.default,),
    _decompose: (_aten.to.device, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.other),
    _index: (
        *(_aten.index.Tensor, _aten._unsafe_index.Tensor),
        *(_aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default),
    ),
    _change_shape_in_place: (
        *(_aten.squeeze_.default, _aten.squeeze_.dim, _aten.squeeze_.dims, _aten.unsqueeze_.default),
        *(_aten.t_.default, _aten.transpose_.default, _aten.as_strided_.default),
    ),
    _read: (
        *(_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default),
        *(_aten.nonzero.default, _aten.masked_select.default, _aten._unique2.default),
    ),
    _refuse: (_aten.resize_.default, _aten.set_.source_Tensor, _aten.set_.source_Storage, _aten.set_data.default),
    _is_same_kind: (_aten._has_compatible_shallow_copy_type.default,),
    _is_not_pinned: (_aten.is_pinned.default,),
    _do_nothing: (_aten.record_stream.default,),
}
_HANDLERS: dict[Any, _Handler] = {overload: handler for handler, overloads in _OVERLOADS_BY_HANDLER.items() for overload in overloads}
