"""Bookkeeping for one virtual GPU: its cap, live bytes, copies, and injected faults.

Bytes and counters only; knows no tensors. Thread-safe.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Container
from dataclasses import dataclass, field

import torch

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """Faults to inject on a device, counted from when they are set. Equal values give equal faults.

    `out_of_memory_at`: which allocations fail (1 is the next one). `out_of_memory_share`: share of allocations that fail at random.
    `lost_at_operation`: from this operation on, all fail as on a card that fell off the bus.
    `link_bytes_per_s`, `link_latency_s`: set the minimum time of every copy to or from the device.
    """

    out_of_memory_at: Container[int] = frozenset()
    out_of_memory_share: float = 0.0
    lost_at_operation: int | None = None
    link_bytes_per_s: float | None = None
    link_latency_s: float = 0.0
    seed: int = 0


@dataclass(slots=True)
class VirtualDevice:
    """One virtual GPU. `charge` and `release` are called for every storage created and freed on it; `num_refused` counts injected failures."""

    name: str
    cap_bytes: int
    peak_bytes: int = 0
    num_allocations: int = 0
    num_operations: int = 0
    num_refused: int = 0
    faults: Faults | None = None
    _random: random.Random = field(default_factory=random.Random, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _live_bytes: int = 0
    _released: deque[int] = field(default_factory=deque, repr=False)

    @property
    def live_bytes(self) -> int:
        with self._lock:
            return self._count_live()

    @property
    def free_bytes(self) -> int:
        return max(0, self.cap_bytes - self.live_bytes)

    def set_faults(self, faults: Faults | None) -> None:
        """Set the faults (None for no faults) and restart their counters."""
        with self._lock:
            self.faults = faults
            self.num_allocations = self.num_operations = self.num_refused = 0
            self._random.seed(faults.seed if faults else 0)

    def reset_peak(self) -> None:
        """Restart the peak from the live bytes."""
        with self._lock:
            self.peak_bytes = self._count_live()

    def charge(self, need_bytes: int) -> None:
        """Count a new storage. Raises: torch.OutOfMemoryError at the cap, or for an injected fault."""
        with self._lock:
            self.num_allocations += 1
            live_bytes = self._count_live()
            if live_bytes + need_bytes > self.cap_bytes:
                raise torch.OutOfMemoryError(self._describe_shortage(need_bytes))
            if self.faults is not None and self._fails_now(self.faults):
                self.num_refused += 1
                raise torch.OutOfMemoryError(f"{self._describe_shortage(need_bytes)} (Injected fault, allocation {self.num_allocations}.)")
            self._live_bytes = live_bytes + need_bytes
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def release(self, freed_bytes: int) -> None:
        """Count a freed storage. Takes no lock: the garbage collector may call it inside any other method."""
        self._released.append(freed_bytes)

    def begin_operation(self) -> None:
        """Count an operation on the device. Raises: torch.AcceleratorError if the device is lost."""
        self.num_operations += 1
        faults = self.faults
        if faults is not None and faults.lost_at_operation is not None and self.num_operations >= faults.lost_at_operation:
            raise torch.AcceleratorError(f"{self.name} error: the device is lost. (Injected fault, operation {self.num_operations}.)")

    def delay_copy(self, moved_bytes: int) -> None:
        """Wait as long as the injected slow link would take; without that fault return at once."""
        faults = self.faults
        if faults is None:
            return
        needed_s = faults.link_latency_s + (moved_bytes / faults.link_bytes_per_s if faults.link_bytes_per_s else 0.0)
        if needed_s > 0:
            time.sleep(needed_s)

    def _fails_now(self, faults: Faults) -> bool:
        by_chance = faults.out_of_memory_share > 0 and self._random.random() < faults.out_of_memory_share
        return by_chance or self.num_allocations in faults.out_of_memory_at

    def _count_live(self) -> int:
        """Live bytes, after subtracting what was released since the last count. The caller holds the lock."""
        while self._released:
            self._live_bytes -= self._released.popleft()
        return self._live_bytes

    def _describe_shortage(self, need_bytes: int) -> str:
        free_bytes = self.cap_bytes - self._live_bytes
        return (
            f"{self.name} out of memory. Tried to allocate {need_bytes / MIB:.2f} MiB ({need_bytes} bytes). Its capacity is "
            f"{self.cap_bytes / MIB:.2f} MiB: {self._live_bytes / MIB:.2f} MiB are in use by tensors, {free_bytes / MIB:.2f} MiB are free."
        )


class CopyCounter:
    """Bytes and number of copies between each ordered pair of devices, by name ("cpu", "vgpu:0")."""

    def __init__(self) -> None:
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._copies: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, source: str, target: str, moved_bytes: int) -> None:
        with self._lock:
            self._bytes[source, target] += moved_bytes
            self._copies[source, target] += 1

    def bytes_by_pair(self) -> dict[tuple[str, str], int]:
        with self._lock:
            return dict(self._bytes)

    def copies_by_pair(self) -> dict[tuple[str, str], int]:
        with self._lock:
            return dict(self._copies)

    def reset(self) -> None:
        with self._lock:
            self._bytes.clear()
            self._copies.clear()
