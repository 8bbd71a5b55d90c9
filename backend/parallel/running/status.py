"""The current state of slots, plan and links, for display. Read-only; a query takes about a millisecond.

Code that makes plans reports the current plan here. Must not know pages or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from backend import memory_management
from backend.devices import virtual_gpu
from backend.devices.device_memory import read_device_bytes
from backend.devices.links import Verdicts
from backend.devices.slot import Slot
from backend.devices.telemetry import GpuTelemetry, find_telemetry, read_telemetry
from backend.parallel.planning.plan import HasStrategy, Plan, Strategy
from backend.parallel.planning.slot_facts import Link


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotStatus:
    """The current state of one slot. `speed` is relative to the first slot. Unknown values are None.

    `resident_bytes` are weights that memory management placed, `holders` their names and bytes, `peak_bytes` the most that tensors ever used.
    `utilization` is in percent, `temperature` in degrees Celsius, `power` in watts. Slots on the same device report the same bytes.
    """

    index: int
    name: str
    torch_device: str
    vram_state: str
    total_bytes: int
    free_bytes: int
    resident_bytes: int
    peak_bytes: int | None
    speed: float
    utilization: int | None = None
    temperature: int | None = None
    power: float | None = None
    holders: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanStatus(HasStrategy):
    """The current plan. `replicas` counts whole copies of the network; `stages` lists each copy's slots in order.

    `rows` is how many rows of one step each replica takes. `tiles`: if slots compute rows together, each slot's part of a row, in rows of latents
    or tokens, by team of slots; `rows` then gives each copy its team's. Times are for one step of all images.
    """

    strategy: Strategy
    reason: str
    replicas: int
    stages: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    predicted_ms: float | None
    measured_ms: float | None
    predicted_bytes: Mapping[int, int]
    tiles: tuple[Mapping[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkStatus:
    """The link from one slot to another: `route` as in `backend.devices.links`, and the speed that plans assume."""

    source: int
    target: int
    route: str
    reason: str
    bytes_per_ms: float
    latency_ms: float


@dataclass(slots=True)
class _Now:
    plan: PlanStatus | None = None
    links: tuple[LinkStatus, ...] = ()
    speeds: Mapping[int, float] = field(default_factory=dict)


_now = _Now()


# telling


def set_current_plan(plan: Plan | None, *, rows: Sequence[int] = (), measured_ms: float | None = None) -> None:
    """Set the plan that jobs use from now on, or None. `rows`: rows of a step for each replica."""
    _now.plan = None if plan is None else _describe_plan(plan, tuple(rows), measured_ms)


def set_speeds(speeds: Mapping[int, float]) -> None:
    """Set the measured speeds of slots by index, in any unit."""
    _now.speeds = dict(speeds)


def set_links(links: Sequence[Link], verdicts: Verdicts) -> None:
    """Set the links that plans use, with the reasons for their routes."""
    known = {pair: (verdict.route, verdict.reason) for pair, verdict in verdicts.items()}
    _now.links = tuple(_describe_link(link, *known.get((link.source, link.target), ("unknown", "not tested"))) for link in links)


def _describe_plan(plan: Plan, rows: tuple[int, ...], measured_ms: float | None) -> PlanStatus:
    return PlanStatus(
        strategy=plan.strategy,
        reason=plan.reason,
        replicas=len(plan.replicas),
        stages=tuple(tuple(stage.slot for stage in replica.stages) for replica in plan.replicas),
        rows=rows,
        predicted_ms=plan.predicted_ms or None,
        measured_ms=measured_ms,
        predicted_bytes=dict(plan.predicted_bytes),
        tiles=tuple(dict(zip(team.slots, team.rows)) for team in plan.tiles),
    )


def _describe_link(link: Link, route: str, reason: str) -> LinkStatus:
    return LinkStatus(source=link.source, target=link.target, route=route, reason=reason, bytes_per_ms=link.bytes_per_ms, latency_ms=link.latency_ms)


# asking


def current_plan() -> PlanStatus | None:
    return _now.plan


def current_links() -> tuple[LinkStatus, ...]:
    return _now.links


def describe_slots() -> tuple[SlotStatus, ...]:
    """Every slot that the flags name: busy, idle and lost."""
    slots = memory_management.current_store().all_slots
    cards = read_telemetry() if any(slot.torch_device.type == "cuda" for slot in slots) else ()
    holders = {row.device: row.holders for row in memory_management.describe_devices()}
    lost, speeds = memory_management.lost_devices(), _now.speeds
    return tuple(
        _describe_lost(slot)
        if slot.torch_device in lost
        else _describe_slot(slot, find_telemetry(slot.torch_device, cards), holders, _relative_speed(slot, slots[0], speeds))
        for slot in slots
    )


def _relative_speed(slot: Slot, first: Slot, speeds: Mapping[int, float]) -> float:
    if speeds.get(slot.index) and speeds.get(first.index):
        return speeds[slot.index] / speeds[first.index]
    return slot.relative_speed


def _describe_slot(slot: Slot, card: GpuTelemetry | None, holders_by_device: Mapping[str, tuple[tuple[str, int], ...]], speed: float) -> SlotStatus:
    holders = holders_by_device.get(str(slot.torch_device), ())
    total_bytes, free_bytes = _room(slot.torch_device, card)
    return SlotStatus(
        index=slot.index,
        name=slot.name,
        torch_device=str(slot.torch_device),
        vram_state=memory_management.vram_state_of(slot.torch_device).name,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        resident_bytes=sum(held_bytes for _, held_bytes in holders),
        peak_bytes=_peak_bytes(slot.torch_device),
        speed=speed,
        utilization=card.utilization_percent if card else None,
        temperature=card.temperature_celsius if card else None,
        power=card.power_watts if card else None,
        holders=holders,
    )


def _describe_lost(slot: Slot) -> SlotStatus:
    """A lost slot, without querying its dead device."""
    return SlotStatus(
        index=slot.index,
        name=slot.name,
        torch_device=str(slot.torch_device),
        vram_state="LOST",
        total_bytes=slot.total_bytes,
        free_bytes=0,
        resident_bytes=0,
        peak_bytes=None,
        speed=slot.relative_speed,
    )


def _room(device: torch.device, card: GpuTelemetry | None) -> tuple[int, int]:
    """Total and free bytes. An unused card is queried through its driver, because torch would allocate memory on it to answer."""
    if device.type == "cuda" and card is not None and not _has_context(device):
        return card.total_bytes, card.total_bytes - card.used_bytes
    now = read_device_bytes(device)
    return now.total_bytes, now.free_bytes


def _has_context(device: torch.device) -> bool:
    return torch.cuda.is_initialized() and torch.cuda.memory_reserved(device) > 0  # type: ignore[no-untyped-call]


def _peak_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device)) if _has_context(device) else 0
    if device.type == "xpu":
        return int(torch.xpu.max_memory_allocated(device))
    if device.type == virtual_gpu.DEVICE_TYPE:
        return virtual_gpu.get_device(device).peak_bytes
    return None
