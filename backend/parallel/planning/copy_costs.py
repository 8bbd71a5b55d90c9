"""What whole copies of a network and their ControlNets cost: time, bytes, and where the ControlNets may run. Numbers only.

A ControlNet is either copied along with every copy of the network and runs there for that copy's rows, or it is shared: it runs on one slot for
the rows of all copies, before anything else there, while the copies on other slots run the segments before the first residual.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement, product

from backend.parallel.planning.candidate import JobShape
from backend.parallel.planning.costs import ComponentCost, ModelProfile
from backend.parallel.planning.slot_facts import LinkTable, SlotFacts

SharedControls = Mapping[str, SlotFacts]
"""ControlNets that run on one slot for all copies, with that slot. The others are copied with every copy of the network."""

_MOST_PLACES = 300


@dataclass(frozen=True, slots=True)
class CopyCosts:
    """Costs of a job's whole copies for one choice of shared ControlNets."""

    profile: ModelProfile
    slots: tuple[SlotFacts, ...]
    table: LinkTable
    job: JobShape
    shared_controls: SharedControls = field(default_factory=dict)

    def with_shared_controls(self, shared_controls: SharedControls) -> CopyCosts:
        return replace(self, shared_controls=shared_controls)

    @property
    def copied(self) -> tuple[ComponentCost, ...]:
        """ControlNets that are copied with every copy of the network."""
        return tuple(control for control in self.job.control_networks if control.name not in self.shared_controls)

    def shared_control_places(self, copies: tuple[SlotFacts, ...]) -> Iterator[dict[str, SlotFacts]]:
        """Choices of ControlNets to share among these copies and of their slots. The first choice shares none."""
        control_networks = self.job.control_networks
        options: list[SlotFacts | None] = [None, *(slot for slot in self.slots if len(copies) > 1 or slot is not copies[0])]
        while len(options) > 2 and len(options) ** len(control_networks) > _MOST_PLACES:
            options.pop()
        alike = len({(control.flops_per_row, control.weight_bytes) for control in control_networks}) <= 1
        ways = combinations_with_replacement(options, len(control_networks)) if alike else product(options, repeat=len(control_networks))
        for way in ways:
            yield {control.name: slot for control, slot in zip(control_networks, way, strict=True) if slot is not None}

    # time

    def copy_ms(self, slot: SlotFacts, num_rows: int) -> float:
        """Time of `num_rows` rows on a copy with its copied ControlNets, including the transfer of latents and results."""
        num_bytes = num_rows * self.profile.copy_bytes_per_row
        primary = self.slots[0]
        way_ms = self.table.latency_ms(primary, slot) + self.table.latency_ms(slot, primary)
        return (
            self._network_ms(slot, num_rows)
            + self._control_networks_ms(slot, num_rows, self.copied)
            + way_ms
            + num_bytes * self.table.ms_per_byte(primary, slot)
        )

    def _network_ms(self, slot: SlotFacts, num_rows: int) -> float:
        profile = self.profile
        return math.fsum(slot.forward_ms(rows * profile.work_per_row, profile.weight_bytes, profile.num_kernels) for rows in self.forwards(num_rows))

    def _control_networks_ms(self, slot: SlotFacts, num_rows: int, control_networks: Sequence[ComponentCost]) -> float:
        return math.fsum(
            slot.forward_ms(rows * control.flops_per_row, control.weight_bytes, control.num_kernels)
            for control in control_networks
            for rows in self.forwards(num_rows)
        )

    def busy_ms(self, slot: SlotFacts) -> float:
        """Time of the shared ControlNets on this slot."""
        return self._control_networks_ms(
            slot, self.job.num_rows, [control for control in self.job.control_networks if self.shared_controls.get(control.name) is slot]
        )

    def ends_ms(self, slots: Sequence[SlotFacts], dealt: Sequence[int]) -> list[float]:
        """When each copy is done. It runs its slot's ControlNets, then the segments before the first residual, waits for residuals from other
        slots, and runs the rest."""
        ends, rows_so_far = [], 0
        for slot, num_rows in zip(slots, dealt):
            rows_so_far += num_rows
            whole_ms, way_in_ms = self.copy_ms(slot, num_rows), self.profile.share_before_control * self._network_ms(slot, num_rows)
            start_ms = self.busy_ms(slot) + self._control_networks_ms(slot, num_rows, self.copied)
            ready_ms = [self._ready_ms(other, slot, rows_so_far, num_rows) for other in self.shared_controls.values() if other is not slot]
            ends.append(max([start_ms + way_in_ms, *ready_ms]) + whole_ms - self._control_networks_ms(slot, num_rows, self.copied) - way_in_ms)
        return ends

    def _ready_ms(self, source: SlotFacts, target: SlotFacts, rows_so_far: int, num_rows: int) -> float:
        """When `source` has made the residuals of the first `rows_so_far` rows and those of the copy's `num_rows` have arrived at `target`."""
        way_ms = self.table.latency_ms(source, target) + num_rows * self.profile.control_bytes_per_row * self.table.ms_per_byte(source, target)
        return self.busy_ms(source) * rows_so_far / self.job.num_rows + way_ms

    def forwards(self, num_rows: int) -> list[int]:
        """How many rows each forward takes."""
        most = max(1, self.job.rows_per_forward)
        return [most] * (num_rows // most) + ([num_rows % most] if num_rows % most else [])

    def launches_ms(self, slots: Sequence[SlotFacts], dealt: Sequence[int]) -> float:
        """Launch time of all slots together: they share one interpreter."""
        kernels = self.profile.num_kernels + sum(control.num_kernels for control in self.copied)
        own_ms = sum(len(self.forwards(num_rows)) * kernels * slot.kernel_ms for slot, num_rows in zip(slots, dealt))
        num_forwards = len(self.forwards(self.job.num_rows))
        return own_ms + sum(
            num_forwards * control.num_kernels * self.shared_controls[control.name].kernel_ms
            for control in self.job.control_networks
            if control.name in self.shared_controls
        )

    # bytes

    def residual_bytes(self, slots: Sequence[SlotFacts], dealt: Sequence[int]) -> int:
        """Bytes of residuals that cross between devices in a step."""
        crossing_rows = sum(
            num_rows for slot, num_rows in zip(slots, dealt) for other in self.shared_controls.values() if self.table.crosses(other, slot)
        )
        return crossing_rows * self.profile.control_bytes_per_row

    def place(self, slots: Sequence[SlotFacts], dealt: Sequence[int]) -> tuple[dict[int, int], dict[str, int]]:
        """Peak bytes per slot, and the slot of each component. Slots on one device share weights."""
        peak_bytes = {slot.index: slot.fixed_bytes for slot in self.slots}
        holders: set[str] = set()
        weights = self.profile.weight_bytes + sum(control.weight_bytes for control in self.copied)
        for slot, num_rows in zip(slots, dealt):
            rows = min(max(1, self.job.rows_per_forward), max(1, num_rows))
            working = max([self.profile.working_bytes_per_row(), *(control.working_bytes_per_row for control in self.copied)])
            peak_bytes[slot.index] += rows * working + (0 if slot.device in holders else weights)
            holders.add(slot.device)
            peak_bytes[slot.index] += num_rows * self.profile.control_bytes_per_row if self.shared_controls else 0
        for control in self.job.control_networks:
            if control.name in self.shared_controls:
                self._add_shared_control(peak_bytes, control, self.shared_controls[control.name], slots)
        component_slots = {control.name: self.shared_controls.get(control.name, slots[0]).index for control in self.job.control_networks}
        others = sorted((component for component in self.job.components if not component.runs_per_row), key=lambda one: -one.weight_bytes)
        for component in others:
            place = max(self.slots, key=lambda slot: (slot.budget_bytes - peak_bytes[slot.index], -slot.index))
            peak_bytes[place.index] += component.weight_bytes
            component_slots[component.name] = place.index
        return peak_bytes, component_slots

    def _add_shared_control(self, peak_bytes: dict[int, int], control: ComponentCost, slot: SlotFacts, copies: Sequence[SlotFacts]) -> None:
        """Charge weights, the residuals of all rows and, unless the slot has a copy of the network anyway, working memory."""
        working = 0 if slot in copies else max(1, self.job.rows_per_forward) * control.working_bytes_per_row
        peak_bytes[slot.index] += control.weight_bytes + working + self.job.num_rows * self.profile.control_bytes_per_row
