"""What the planner knows of slots and of the ways between them: numbers only, no devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

HOST_BYTES_PER_MS = 10e6
"""10 GB/s: a copy through host memory over PCIe 4.0 x16, the usual case for cards without peer access."""
HOST_LATENCY_MS = 0.04


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotFacts:
    """One slot as the planner sees it.

    `speed` is effective FLOPs per ms at this network's shapes; measured once units have run, estimated before. `budget_bytes` is all the slot
    may hold, `fixed_bytes` what of that is taken already (text encoders, VAE, ControlNets that were placed), `total_bytes` the card's size:
    slots with the same are alike and are balanced. Slots with one `device_key` share one copy of the weights and their budget.
    `memory_bytes_per_ms`: weights are read once per forward, which is why two rows in one forward take less than twice one (inf: not counted).
    `kernel_ms`: time to launch one operation; a forward is not faster than its launches (0: not counted), and as the worker threads share
    one interpreter, launches of several slots add up. `is_home`: the network stands there, or would where nothing is divided.
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

    def __post_init__(self) -> None:
        if not (self.speed > 0 and math.isfinite(self.speed)):
            raise ValueError(f"Slot {self.index} was given the speed {self.speed}; it must be a positive number of FLOPs per ms.")

    @property
    def free_bytes(self) -> int:
        """What is left of the budget."""
        return self.budget_bytes - self.fixed_bytes

    @property
    def device(self) -> str:
        return self.device_key or f"slot {self.index}"

    def forward_ms(self, work: Any, weight_bytes: Any, num_kernels: Any) -> Any:
        """Time of one forward with that much work in all its rows. Takes numbers or arrays of them."""
        compute_ms = work / self.speed + weight_bytes / self.memory_bytes_per_ms
        return compute_ms if self.kernel_ms == 0 else _larger(compute_ms, num_kernels * self.kernel_ms)

    def facts_without_index(self) -> SlotFacts:
        """The same with neither number nor name nor home: two slots with equal results are interchangeable in plans over several."""
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
                f"The link from slot {self.source} to slot {self.target} was given {self.bytes_per_ms} bytes per ms and {self.latency_ms} ms; "
                "the first must be positive and the second not negative."
            )


class LinkTable:
    """Links by their ends. Where none is known a copy through host memory is assumed."""

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = {(link.source, link.target): link for link in links}

    def crosses(self, source: SlotFacts, target: SlotFacts) -> bool:
        """Whether bytes must be copied: two slots of one device share them."""
        return source.index != target.index and source.device != target.device

    def ms_per_byte(self, source: SlotFacts, target: SlotFacts) -> float:
        return 1.0 / self._find(source, target).bytes_per_ms if self.crosses(source, target) else 0.0

    def latency_ms(self, source: SlotFacts, target: SlotFacts) -> float:
        return self._find(source, target).latency_ms if self.crosses(source, target) else 0.0

    def facts(self, source: SlotFacts, target: SlotFacts) -> tuple[float, float]:
        """ms per byte and latency."""
        return self.ms_per_byte(source, target), self.latency_ms(source, target)

    def _find(self, source: SlotFacts, target: SlotFacts) -> Link:
        return self._links.get((source.index, target.index)) or Link(source=source.index, target=target.index)
