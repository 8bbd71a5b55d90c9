"""Slots for tests: memory management configured with virtual GPUs or CPU slots, and restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.parallel.placing.fleet import Fleet, current_fleet

GIB = 2**30


@contextmanager
def configured_slots(*device_ids: str, virtual_bytes: tuple[int, ...] = (), **config: Any) -> Iterator[Fleet]:
    """A fleet of these devices; `virtual_bytes` are the caps of the virtual GPUs named "0", "1" ..."""
    chosen = BackendConfig(multi_gpu=True, device_ids=device_ids, virtual_gpus_bytes=virtual_bytes, **config)
    memory_management.configure(chosen, probe_devices(chosen))
    try:
        yield current_fleet()
    finally:
        default = BackendConfig(device_ids=("cpu",))
        memory_management.configure(default, probe_devices(default))
        current_fleet()


@contextmanager
def virtual_fleet(count: int, cap_bytes: int = GIB, **config: Any) -> Iterator[Fleet]:
    """That many virtual GPUs, all with the same cap."""
    with configured_slots(*(str(index) for index in range(count)), virtual_bytes=(cap_bytes,) * count, **config) as fleet:
        yield fleet


@contextmanager
def cpu_fleet(count: int) -> Iterator[Fleet]:
    """That many CPU slots with one thread each."""
    with configured_slots(*(["cpu"] * count), cpu_threads_per_slot=1) as fleet:
        yield fleet
