"""What the planner knows about slots and the links between them. Numbers only, no devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

HOST_BYTES_PER_MS = 10e6
"""10 GB/s: a copy through host memory over PCIe 4.0 x16, typical for cards without peer access."""
HOST_LATENCY_MS = 0.04
PINNED_BYTES_PER_MS = 20e6
"""20 GB/s: the same link from page-locked memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotFacts:
    """One slot as the planner sees it.

    `speed` is effective FLOPs per ms at this network's shapes: an estimate until rows have run, measured afterwards. `budget_bytes` is all the
    memory the slot may use, `fixed_bytes` the part already taken (text encoders, VAE, ControlNets already placed), `total_bytes` the card's
    size; the planner balances slots of equal size. Slots with the same `device_key` share one copy of the weights and one budget.
    `memory_bytes_per_ms`: weights are read once per forward, so two rows in one forward take less than twice as long as one (inf: ignored).
    `kernel_ms`: time to launch one operation. A forward takes at least as long as its launches (0: ignored), and the worker threads share one
    interpreter, so launches of several slots add up. `is_home`: the network is on this slot, or would be if the work were not divided.
    `host_bytes_per_ms`: how fast weights stream to it from main memory; 0 if it cannot hold a part of a network and stream the rest (a CPU slot,
    or a flag forbids it). `fetches_ahead`: the next layer's weights come while a layer computes.
    """

    index: int
    speed: float
    budget_bytes: int
    total_bytes: int
    fixed_bytes: int = 0
    name: str = ""
    kind: str = "gpu"
    device_key: str = ""
    memory_bytes_per_ms: float = math.inf
    kernel_ms: float = 0.0
    is_home: bool = False
    host_bytes_per_ms: float = 0.0
    fetches_ahead: bool = False

    def __post_init__(self) -> None:
        if not (self.speed > 0 and math.isfinite(self.speed)):
            raise ValueError(f"Slot {self.index} has speed {self.speed}; it must be a positive, finite number of FLOPs per ms.")

    @property
    def free_bytes(self) -> int:
        """The unused part of the budget."""
        return self.budget_bytes - self.fixed_bytes

    @property
    def device(self) -> str:
        return self.device_key or f"slot {self.index}"

    def forward_ms(self, work: Any, weight_bytes: Any, num_kernels: Any) -> Any:
        """Time of one forward; `work` is the sum over its rows. Takes numbers or arrays of numbers."""
        compute_ms = work / self.speed + weight_bytes / self.memory_bytes_per_ms
        return compute_ms if self.kernel_ms == 0 else _larger(compute_ms, num_kernels * self.kernel_ms)

    @property
    def may_stream(self) -> bool:
        """Whether the slot can hold a part of a network and stream the rest."""
        return self.host_bytes_per_ms > 0

    @property
    def layers_in_flight(self) -> int:
        """How many streamed layers are on the slot at once."""
        return 2 if self.fetches_ahead else 1

    def fetch_ms(self, streamed_bytes: Any, compute_ms: Any) -> Any:
        """Time that streaming adds to a forward of `compute_ms`. Takes numbers or arrays of numbers."""
        copy_ms = streamed_bytes / (self.host_bytes_per_ms or HOST_BYTES_PER_MS)
        return np.maximum(0.0, copy_ms - compute_ms) if self.fetches_ahead else copy_ms

    def facts_without_index(self) -> SlotFacts:
        """The facts without index, name and home. Two slots with equal results are interchangeable in a plan over several slots."""
        return replace(self, index=0, name="", is_home=False)


def _larger(one: Any, other: Any) -> Any:
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return max(one, other)
    return np.maximum(one, other)


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One direction between two slots."""

    source: int
    target: int
    bytes_per_ms: float = HOST_BYTES_PER_MS
    latency_ms: float = HOST_LATENCY_MS

    def __post_init__(self) -> None:
        if not self.bytes_per_ms > 0 or self.latency_ms < 0:
            raise ValueError(
                f"The link from slot {self.source} to slot {self.target} has {self.bytes_per_ms} bytes per ms and a latency of "
                f"{self.latency_ms} ms; the first must be positive and the second must not be negative."
            )


class LinkTable:
    """Links by source and target. A pair without a known link is assumed to copy through host memory."""

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = {(link.source, link.target): link for link in links}

    def crosses(self, source: SlotFacts, target: SlotFacts) -> bool:
        """Whether bytes must be copied. Two slots on one device share them."""
        return source.index != target.index and source.device != target.device

    def ms_per_byte(self, source: SlotFacts, target: SlotFacts) -> float:
        return 1.0 / self._find(source, target).bytes_per_ms if self.crosses(source, target) else 0.0

    def latency_ms(self, source: SlotFacts, target: SlotFacts) -> float:
        return self._find(source, target).latency_ms if self.crosses(source, target) else 0.0

    def facts(self, source: SlotFacts, target: SlotFacts) -> tuple[float, float]:
        """ms per byte, and latency in ms."""
        return self.ms_per_byte(source, target), self.latency_ms(source, target)

    def _find(self, source: SlotFacts, target: SlotFacts) -> Link:
        return self._links.get((source.index, target.index)) or Link(source=source.index, target=target.index)
