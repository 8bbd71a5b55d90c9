"""What whole copies of a network cost with the ControlNets that belong to them: time, bytes, and where the ControlNets may be. Numbers only.

A ControlNet either has a copy with every copy of the network, and runs there for the rows of that copy; or it runs on one slot for the rows of
all copies, before anything else there, while the copies elsewhere are on their way in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement, product
from typing import TYPE_CHECKING

from backend.parallel.planning.costs import ComponentCost, ModelProfile
from backend.parallel.planning.slot_facts import LinkTable, SlotFacts

if TYPE_CHECKING:
    from backend.parallel.planning.planner import JobShape

Apart = Mapping[str, SlotFacts]
"""ControlNets that run on one slot for all copies; the others go with every copy."""

_MOST_PLACES = 300


@dataclass(frozen=True, slots=True)
class CopyCosts:
    """Costs of a job's whole copies, for one choice of where the ControlNets are."""

    profile: ModelProfile
    slots: tuple[SlotFacts, ...]
    table: LinkTable
    job: JobShape
    apart: Apart = field(default_factory=dict)

    def with_riders_on(self, apart: Apart) -> CopyCosts:
        return replace(self, apart=apart)

    @property
    def copied(self) -> tuple[ComponentCost, ...]:
        """ControlNets that go with every copy."""
        return tuple(rider for rider in self.job.riders if rider.name not in self.apart)

    def rider_places(self, copies: tuple[SlotFacts, ...]) -> Iterator[dict[str, SlotFacts]]:
        """Ways to have ControlNets apart from these copies; the first has none apart."""
        riders = self.job.riders
        options: list[SlotFacts | None] = [None, *(slot for slot in self.slots if len(copies) > 1 or slot is not copies[0])]
        while len(options) > 2 and len(options) ** len(riders) > _MOST_PLACES:
            options.pop()
        alike = len({(rider.flops_per_row, rider.weight_bytes) for rider in riders}) <= 1
        ways = combinations_with_replacement(options, len(riders)) if alike else product(options, repeat=len(riders))
        for way in ways:
            yield {rider.name: slot for rider, slot in zip(riders, way, strict=True) if slot is not None}

    # time

    def copy_ms(self, slot: SlotFacts, units: int) -> float:
        """Time of so many units on a copy with the ControlNets that go with it, the way of latents and results included."""
        num_bytes = units * self.profile.copy_bytes_per_row
        primary = self.slots[0]
        way_ms = self.table.latency_ms(primary, slot) + self.table.latency_ms(slot, primary)
        return self._network_ms(slot, units) + self._riders_ms(slot, units, self.copied) + way_ms + num_bytes * self.table.ms_per_byte(primary, slot)

    def _network_ms(self, slot: SlotFacts, units: int) -> float:
        profile = self.profile
        return math.fsum(slot.forward_ms(rows * profile.work_per_row, profile.weight_bytes, profile.num_kernels) for rows in self.forwards(units))

    def _riders_ms(self, slot: SlotFacts, units: int, riders: Sequence[ComponentCost]) -> float:
        return math.fsum(
            slot.forward_ms(rows * rider.flops_per_row, rider.weight_bytes, rider.num_kernels) for rider in riders for rows in self.forwards(units)
        )

    def busy_ms(self, slot: SlotFacts) -> float:
        """Time of the ControlNets that run on this slot for all copies."""
        return self._riders_ms(slot, self.job.num_units, [rider for rider in self.job.riders if self.apart.get(rider.name) is slot])

    def ends_ms(self, slots: Sequence[SlotFacts], dealt: Sequence[int]) -> list[float]:
        """When each copy is done: after the ControlNets on its slot comes its way in, and once residuals from elsewhere are there the rest."""
        ends, rows = [], 0
        for slot, units in zip(slots, dealt):
            rows += units
            whole_ms, way_in_ms = self.copy_ms(slot, units), self.profile.share_before_control * self._network_ms(slot, units)
            start_ms = self.busy_ms(slot) + self._riders_ms(slot, units, self.copied)
            ready_ms = [self._ready_ms(other, slot, rows, units) for other in self.apart.values() if other is not slot]
            ends.append(max([start_ms + way_in_ms, *ready_ms]) + whole_ms - self._riders_ms(slot, units, self.copied) - way_in_ms)
        return ends

    def _ready_ms(self, source: SlotFacts, target: SlotFacts, rows: int, units: int) -> float:
        """When residuals of the first `rows` rows have been made on a slot, and those of one copy's `units` have come to it."""
        way_ms = self.table.latency_ms(source, target) + units * self.profile.control_bytes_per_row * self.table.ms_per_byte(source, target)
        return self.busy_ms(source) * rows / self.job.num_units + way_ms

    def forwards(self, units: int) -> list[int]:
        """Rows of each forward."""
        most = max(1, self.job.rows_per_forward)
        return [most] * (units // most) + ([units % most] if units % most else [])

    def launches_ms(self, slots: Sequence[SlotFacts], dealt: Sequence[int]) -> float:
        """Launches of all slots, which add up."""
        kernels = self.profile.num_kernels + sum(rider.num_kernels for rider in self.copied)
        own_ms = sum(len(self.forwards(units)) * kernels * slot.kernel_ms for slot, units in zip(slots, dealt))
        num_forwards = len(self.forwards(self.job.num_units))
        return own_ms + sum(
            num_forwards * rider.num_kernels * self.apart[rider.name].kernel_ms for rider in self.job.riders if rider.name in self.apart
        )

    # bytes

    def residual_bytes(self, slots: Sequence[SlotFacts], dealt: Sequence[int]) -> int:
        """Residuals that cross in a step."""
        crossing_rows = sum(units for slot, units in zip(slots, dealt) for other in self.apart.values() if self.table.crosses(other, slot))
        return crossing_rows * self.profile.control_bytes_per_row

    def place(self, slots: Sequence[SlotFacts], dealt: Sequence[int]) -> tuple[dict[int, int], dict[str, int]]:
        """Peak bytes per slot and where the components are. Slots of one device share weights."""
        peak_bytes = {slot.index: slot.fixed_bytes for slot in self.slots}
        holders: set[str] = set()
        weights = self.profile.weight_bytes + sum(rider.weight_bytes for rider in self.copied)
        for slot, units in zip(slots, dealt):
            rows = min(max(1, self.job.rows_per_forward), max(1, units))
            working = max([self.profile.working_bytes_per_row(), *(rider.working_bytes_per_row for rider in self.copied)])
            peak_bytes[slot.index] += rows * working + (0 if slot.device in holders else weights)
            holders.add(slot.device)
            peak_bytes[slot.index] += units * self.profile.control_bytes_per_row if self.apart else 0
        for rider in self.job.riders:
            if rider.name in self.apart:
                self._add_apart(peak_bytes, rider, self.apart[rider.name], slots)
        component_slots = {rider.name: self.apart.get(rider.name, slots[0]).index for rider in self.job.riders}
        others = sorted((component for component in self.job.components if not component.runs_per_unit), key=lambda one: -one.weight_bytes)
        for component in others:
            place = max(self.slots, key=lambda slot: (slot.budget_bytes - peak_bytes[slot.index], -slot.index))
            peak_bytes[place.index] += component.weight_bytes
            component_slots[component.name] = place.index
        return peak_bytes, component_slots

    def _add_apart(self, peak_bytes: dict[int, int], rider: ComponentCost, slot: SlotFacts, copies: Sequence[SlotFacts]) -> None:
        """Weights, the residuals of all rows, and working memory where the network's own is not there anyway."""
        working = 0 if slot in copies else max(1, self.job.rows_per_forward) * rider.working_bytes_per_row
        peak_bytes[slot.index] += rider.weight_bytes + working + self.job.num_units * self.profile.control_bytes_per_row
