"""Which devices this process can see. The only place that queries torch about devices; decisions are in `probing`."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import psutil
import torch

from backend.devices import virtual_gpu
from backend.devices.device_memory import read_device_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """One device as its driver describes it.

    `kind` is "cpu", "cuda", "rocm", "mps", "xpu" or "virtual"; `compute_capability` is CUDA's (major, minor), None elsewhere.
    `throughput` is an unmeasured estimate in arbitrary units, useful only to compare devices of one machine; 0 means unknown.
    """

    torch_device: torch.device
    kind: str
    name: str
    total_bytes: int
    compute_capability: tuple[int, int] | None = None
    throughput: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """All devices of the machine, with GPUs in the order in which `--device-id` counts them."""

    gpus: tuple[DeviceFacts, ...]
    cpu: DeviceFacts
    num_cpu_cores: int
    torch_build: str


def take_inventory(virtual_gpus_bytes: tuple[int, ...] = ()) -> Inventory:
    """List the machine's devices. If virtual GPUs are requested, create them; they are then the only GPUs."""
    gpus = _virtual_facts(virtual_gpus_bytes) if virtual_gpus_bytes else _real_gpu_facts()
    return Inventory(gpus=gpus, cpu=describe_device(torch.device("cpu")), num_cpu_cores=_num_usable_cores(), torch_build=str(torch.__version__))


def describe_device(device: torch.device) -> DeviceFacts:
    """Facts about one device, cached for real ones."""
    return _describe_virtual(device) if device.type == virtual_gpu.DEVICE_TYPE else _describe_real(device)


@functools.lru_cache(maxsize=64)
def _describe_real(device: torch.device) -> DeviceFacts:
    describe = {"cuda": _describe_cuda, "xpu": _describe_xpu, "mps": _describe_mps}.get(device.type)
    if describe is not None:
        return describe(device)
    return DeviceFacts(torch_device=torch.device("cpu"), kind="cpu", name="CPU", total_bytes=read_device_bytes(torch.device("cpu")).total_bytes)


def _virtual_facts(caps_bytes: tuple[int, ...]) -> tuple[DeviceFacts, ...]:
    return tuple(_describe_virtual(device) for device in virtual_gpu.install(caps_bytes))


def _real_gpu_facts() -> tuple[DeviceFacts, ...]:
    for device_type, count in (("cuda", _num_cuda()), ("xpu", _num_xpu()), ("mps", int(torch.backends.mps.is_available()))):
        if count:
            return tuple(describe_device(torch.device(device_type, index)) for index in range(count))
    return ()


def _num_cuda() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _num_xpu() -> int:
    return torch.xpu.device_count() if hasattr(torch, "xpu") and torch.xpu.is_available() else 0


def _num_usable_cores() -> int:
    """Physical cores, but no more than this process may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def _describe_cuda(device: torch.device) -> DeviceFacts:
    facts = torch.cuda.get_device_properties(device)
    clock_mhz = getattr(facts, "clock_rate", 0) / 1000 or 1.0
    return DeviceFacts(
        torch_device=device,
        kind="rocm" if torch.version.hip else "cuda",
        name=str(facts.name),
        total_bytes=int(facts.total_memory),
        compute_capability=None if torch.version.hip else (int(facts.major), int(facts.minor)),
        throughput=float(facts.multi_processor_count) * clock_mhz,
    )


def _describe_xpu(device: torch.device) -> DeviceFacts:
    facts = torch.xpu.get_device_properties(device)
    return DeviceFacts(torch_device=device, kind="xpu", name=str(facts.name), total_bytes=int(facts.total_memory))


def _describe_mps(device: torch.device) -> DeviceFacts:
    return DeviceFacts(torch_device=device, kind="mps", name="Apple GPU", total_bytes=read_device_bytes(torch.device("cpu")).total_bytes)


def _describe_virtual(device: torch.device) -> DeviceFacts:
    cap_bytes = virtual_gpu.get_device(device).cap_bytes
    return DeviceFacts(torch_device=device, kind="virtual", name="virtual GPU", total_bytes=cap_bytes, throughput=1.0)
