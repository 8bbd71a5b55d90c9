"""Bytes of one torch device: total, free, and the allocator's share. Knows no slots and no models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from backend.devices import virtual_gpu

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceBytes:
    """Memory of one device at one moment, in bytes.

    `free_bytes` is what a new tensor may use: the driver's free bytes plus the idle bytes of torch's allocator.
    `reserved_bytes` is what that allocator has reserved, `idle_bytes` the unused part of it.
    """

    total_bytes: int
    free_bytes: int
    reserved_bytes: int
    idle_bytes: int


def read_device_bytes(device: torch.device) -> DeviceBytes:
    """Memory of a device, from its driver (or the operating system) and torch's allocator."""
    if device.type == "cuda":
        return _read_cuda(device)
    if device.type == "xpu":
        return _read_xpu(device)
    if device.type == "mps":
        return _read_mps()
    if device.type == virtual_gpu.DEVICE_TYPE:
        return _read_virtual(device)
    return _read_host()


def empty_cache(device: torch.device) -> None:
    """Return torch's idle memory on `device` to the driver. Does nothing on a device without a caching allocator."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
    elif device.type == "xpu":
        torch.xpu.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _read_cuda(device: torch.device) -> DeviceBytes:
    driver_free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    stats = torch.cuda.memory_stats(device)
    reserved_bytes, active_bytes = stats.get("reserved_bytes.all.current", 0), stats.get("active_bytes.all.current", 0)
    idle_bytes = max(0, reserved_bytes - active_bytes)
    return DeviceBytes(total_bytes=total_bytes, free_bytes=driver_free_bytes + idle_bytes, reserved_bytes=reserved_bytes, idle_bytes=idle_bytes)


def _read_xpu(device: torch.device) -> DeviceBytes:
    stats = torch.xpu.memory_stats(device)
    total_bytes = int(torch.xpu.get_device_properties(device).total_memory)
    reserved_bytes, active_bytes = stats.get("reserved_bytes.all.current", 0), stats.get("active_bytes.all.current", 0)
    return DeviceBytes(
        total_bytes=total_bytes,
        free_bytes=max(0, total_bytes - active_bytes),
        reserved_bytes=reserved_bytes,
        idle_bytes=max(0, reserved_bytes - active_bytes),
    )


def _read_mps() -> DeviceBytes:
    host = _read_host()
    reserved_bytes, active_bytes = int(torch.mps.driver_allocated_memory()), int(torch.mps.current_allocated_memory())
    idle_bytes = max(0, reserved_bytes - active_bytes)
    return DeviceBytes(total_bytes=host.total_bytes, free_bytes=host.free_bytes + idle_bytes, reserved_bytes=reserved_bytes, idle_bytes=idle_bytes)


def _read_virtual(device: torch.device) -> DeviceBytes:
    virtual_device = virtual_gpu.get_device(device)
    live_bytes = virtual_device.live_bytes
    free_bytes = max(0, virtual_device.cap_bytes - live_bytes)
    return DeviceBytes(total_bytes=virtual_device.cap_bytes, free_bytes=free_bytes, reserved_bytes=live_bytes, idle_bytes=0)


def _read_host() -> DeviceBytes:
    memory = psutil.virtual_memory()
    total_bytes, free_bytes = int(memory.total), int(memory.available)
    limit_bytes = _read_number(_CGROUP / "memory.max")
    if limit_bytes is not None and limit_bytes < total_bytes:
        total_bytes = limit_bytes
        free_bytes = min(free_bytes, max(0, limit_bytes - _container_used_bytes()))
    return DeviceBytes(total_bytes=total_bytes, free_bytes=free_bytes, reserved_bytes=total_bytes, idle_bytes=free_bytes)


def _container_used_bytes() -> int:
    """Bytes in use in a memory-limited container, without the file cache that the kernel can drop."""
    used_bytes = _read_number(_CGROUP / "memory.current") or 0
    return max(0, used_bytes - _reclaimable_bytes())


def _reclaimable_bytes() -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    stats = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(stats.get("inactive_file", 0)) + int(stats.get("slab_reclaimable", 0))


def _read_number(path: Path) -> int | None:
    """The number in a file that contains one number; None if the file does not exist or says "max"."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
