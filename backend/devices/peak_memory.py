"""The most memory that tensors used on a device since the last reset. A query never creates a context on a card."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backend.devices import virtual_gpu


@dataclass(frozen=True, kw_only=True, slots=True)
class PeakBytes:
    """Peak bytes of tensors, and of the allocator, which reserves more than they need. None if nobody counts them."""

    allocated_bytes: int | None
    reserved_bytes: int | None


def read_peak(device: torch.device) -> PeakBytes:
    if device.type == "cuda":
        if not _has_context():
            return PeakBytes(allocated_bytes=0, reserved_bytes=0)
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return PeakBytes(allocated_bytes=int(allocated), reserved_bytes=int(reserved))
    if device.type == "xpu":
        return PeakBytes(allocated_bytes=int(torch.xpu.max_memory_allocated(device)), reserved_bytes=int(torch.xpu.max_memory_reserved(device)))
    if device.type == virtual_gpu.DEVICE_TYPE:
        return PeakBytes(allocated_bytes=virtual_gpu.get_device(device).peak_bytes, reserved_bytes=None)
    return PeakBytes(allocated_bytes=None, reserved_bytes=None)


def reset_peak(device: torch.device) -> None:
    """Restart the peak from the current usage."""
    if device.type == "cuda" and _has_context():
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "xpu":
        torch.xpu.reset_peak_memory_stats(device)
    elif device.type == virtual_gpu.DEVICE_TYPE:
        virtual_gpu.get_device(device).reset_peak()


def _has_context() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
