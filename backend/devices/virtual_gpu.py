"""Virtual GPUs: our own torch device type ("vgpu"), whose tensors are in CPU memory and are computed with CPU kernels.

It refuses to mix tensors of two devices, counts every byte of every tensor and every byte copied between devices, raises
`torch.OutOfMemoryError` at a cap per device, and injects faults. For tests, for demonstrations, and for people without GPUs who want to
see a plan work. Inference only. Scratch memory inside a CPU kernel is not counted.

Installation affects the whole process: torch supports only one such device type, and `Module.to` is set to swap parameters in place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import backend_registration

from backend.devices import virtual_tensor
from backend.devices.virtual_device import Faults as Faults
from backend.devices.virtual_device import VirtualDevice
from backend.devices.virtual_tensor import HostReadError as HostReadError
from backend.devices.virtual_tensor import VirtualTensor as VirtualTensor

DEVICE_TYPE = "vgpu"

_TAKEN_WHOLE = (
    "linear",
    "matmul",
    "einsum",
    "scaled_dot_product_attention",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose2d.input",
    "group_norm",
    "layer_norm",
    "reshape",
)
"""Composite operations to run whole: torch decomposes the first four differently than on the CPU, and decomposing the others is slow here."""


@dataclass(slots=True)
class _Installed:
    libraries: list[torch.library.Library] = field(default_factory=list)
    """The registrations live as long as these objects."""
    lock: threading.Lock = field(default_factory=threading.Lock)


_installed = _Installed()


def install(caps_bytes: Sequence[int]) -> tuple[torch.device, ...]:
    """Create the virtual GPUs "vgpu:0", "vgpu:1", ... with these caps, replacing those of an earlier call.

    Tensors from an earlier call stay valid and count on their old devices, which do not mix with the new ones.
    """
    with _installed.lock:
        if not _installed.libraries:
            _register_device_type()
        virtual_tensor.devices[:] = [VirtualDevice(name=f"{DEVICE_TYPE}:{index}", cap_bytes=cap) for index, cap in enumerate(caps_bytes)]
        virtual_tensor.copies.reset()
    return installed_devices()


def installed_devices() -> tuple[torch.device, ...]:
    """The current virtual GPUs."""
    return tuple(torch.device(DEVICE_TYPE, index) for index in range(len(virtual_tensor.devices)))


def get_device(device: torch.device | str | int) -> VirtualDevice:
    """The bookkeeping of one virtual GPU. Raises: RuntimeError if it does not exist."""
    index = device if isinstance(device, int) else int(str(device).partition(":")[2] or 0)
    if index >= len(virtual_tensor.devices):
        raise RuntimeError(f"{device} does not exist; there are {len(virtual_tensor.devices)} virtual GPUs. Name more with --virtual-gpus.")
    return virtual_tensor.devices[index]


@contextmanager
def refusing_host_reads() -> Iterator[None]:
    """Until the end of the block, what makes the host wait for a virtual GPU raises HostReadError, in every thread: `.item()`, `.cpu()`, `bool(...)`,
    `torch.tensor(list, device=...)`, results whose shape depends on numbers."""
    virtual_tensor.host_reads.refused = True
    try:
        yield
    finally:
        virtual_tensor.host_reads.refused = False


def copied_bytes() -> dict[tuple[str, str], int]:
    """Bytes copied from one device to another since the last reset, by (source, target)."""
    return virtual_tensor.copies.bytes_by_pair()


def reset_copied_bytes() -> None:
    virtual_tensor.copies.reset()


def _register_device_type() -> None:
    backend_registration._setup_privateuseone_for_python_backend(DEVICE_TYPE, backend_module=_BackendModule())
    library: Any = torch.library.Library  # untyped in torch
    factories = library("_", "IMPL")
    factories.fallback(virtual_tensor.run_factory, "PrivateUse1")
    whole = library("aten", "IMPL")
    whole.impl("_copy_from", virtual_tensor.copy_from, "PrivateUse1")
    for name in _TAKEN_WHOLE:
        packet, _, overload = name.partition(".")
        func: Any = getattr(getattr(torch.ops.aten, packet), overload or "default")
        whole.impl(name, virtual_tensor.make_whole_kernel(func), "AutogradPrivateUse1")
    torch.__future__.set_swap_module_params_on_conversion(True)
    _installed.libraries += [factories, whole]


class _BackendModule:
    """The module that torch requires of a device type, available as `torch.vgpu`."""

    def is_available(self) -> bool:
        return bool(virtual_tensor.devices)

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return len(virtual_tensor.devices)

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: object = None) -> None:
        """Does nothing: no work is ever pending."""

    def empty_cache(self) -> None:
        """Does nothing: there is no caching allocator."""

    def memory_allocated(self, device: torch.device | str | int = 0) -> int:
        return get_device(device).live_bytes

    def max_memory_allocated(self, device: torch.device | str | int = 0) -> int:
        return get_device(device).peak_bytes

    def mem_get_info(self, device: torch.device | str | int = 0) -> tuple[int, int]:
        return get_device(device).free_bytes, get_device(device).cap_bytes

    def manual_seed_all(self, seed: int) -> None:
        """Does nothing: random numbers come from the CPU's generator, which torch seeds itself."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False
