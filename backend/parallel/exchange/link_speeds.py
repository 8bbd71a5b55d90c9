"""How fast tensors move between slots, for the planner. Takes the link test's verdicts, and estimates or measures what they do not cover."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch

from backend.devices import virtual_gpu
from backend.devices.links import Verdict, Verdicts
from backend.devices.slot import Slot
from backend.parallel.planning.slot_facts import HOST_BYTES_PER_MS, HOST_LATENCY_MS, Link

_TIMED_BYTES = 8 * 2**20
_NUM_TIMED = 3
_THREAD_LATENCY_MS = 0.05
"""Time to hand something from one worker's thread to another's, which every copy needs."""


def measure_links(slots: Sequence[Slot], verdicts: Verdicts | None = None) -> tuple[Link, ...]:
    """A link for every ordered pair of slots. The first call takes a few milliseconds. `verdicts` come from `link_verdicts`."""
    known = verdicts or {}
    pairs = [(source, target) for source in slots for target in slots if source.index != target.index]
    return tuple(_measure_link(source, target, known.get((source.index, target.index))) for source, target in pairs)


def _measure_link(source: Slot, target: Slot, verdict: Verdict | None) -> Link:
    bytes_per_ms, latency_ms = _measure(source.torch_device, target.torch_device, verdict)
    return Link(source=source.index, target=target.index, bytes_per_ms=bytes_per_ms, latency_ms=latency_ms)


def _measure(source: torch.device, target: torch.device, verdict: Verdict | None) -> tuple[float, float]:
    if source == target:
        return host_bytes_per_ms(), 0.0
    if verdict is not None and verdict.bytes_per_ms is not None and verdict.latency_ms is not None:
        return verdict.bytes_per_ms, verdict.latency_ms
    types = {source.type, target.type}
    if types <= {"cpu", virtual_gpu.DEVICE_TYPE}:
        return _in_main_memory(source, target)
    if types == {"cpu", "cuda"}:
        return time_host_copy(source if source.type == "cuda" else target, to_device=target.type == "cuda")
    return HOST_BYTES_PER_MS, HOST_LATENCY_MS


def _in_main_memory(source: torch.device, target: torch.device) -> tuple[float, float]:
    """Copies to and from virtual GPUs are copies in main memory, slowed to the link speed that an injected fault simulates."""
    bytes_per_ms, latency_ms = host_bytes_per_ms(), _THREAD_LATENCY_MS
    for device in (source, target):
        faults = virtual_gpu.get_device(device).faults if device.type == virtual_gpu.DEVICE_TYPE else None
        if faults is not None:
            latency_ms += 1000 * faults.link_latency_s
            bytes_per_ms = min(bytes_per_ms, faults.link_bytes_per_s / 1000 if faults.link_bytes_per_s else bytes_per_ms)
    return bytes_per_ms, latency_ms


@functools.lru_cache(maxsize=1)
def host_bytes_per_ms() -> float:
    """Speed of a copy within main memory."""
    return _TIMED_BYTES / _shortest_ms(torch.zeros(_TIMED_BYTES, dtype=torch.uint8).clone)


@functools.lru_cache(maxsize=64)
def time_host_copy(device: torch.device, *, to_device: bool) -> tuple[float, float]:
    """Bytes per ms and latency between page-locked main memory and a CUDA device."""

    def time_copy(num_bytes: int) -> float:
        host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        source, target = (host, there) if to_device else (there, host)

        def copy() -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)

        return _shortest_ms(copy)

    latency_ms, large_ms = time_copy(1024), time_copy(_TIMED_BYTES)
    return _TIMED_BYTES / max(large_ms - latency_ms, 1e-3), latency_ms


def _shortest_ms(copy: Callable[[], object]) -> float:
    times_ms = []
    for _ in range(_NUM_TIMED + 1):
        began_s = time.perf_counter()
        copy()
        times_ms.append(1000 * (time.perf_counter() - began_s))
    return max(min(times_ms), 1e-3)
