"""Describes the slots in words: the table of --list-gpus, and advice for idle slots. Knows no page and queries no device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from backend.devices.slot import format_bytes

if TYPE_CHECKING:
    from backend.parallel.planning.preview import Preview
    from backend.parallel.running.status import PlanStatus, SlotStatus
    from modules.jobs.profile_record import JobRecord, SlotRecord

STATES = {
    "DISABLED": "main memory",
    "NO_VRAM": "no VRAM to spare",
    "LOW_VRAM": "low VRAM",
    "NORMAL_VRAM": "normal",
    "HIGH_VRAM": "keeps models",
    "SHARED": "shared memory",
    "LOST": "lost",
}
LITTLE_USED = 0.5
"""A slot busy for less than this share of a job gets advice."""
_WHAT_WOULD_HELP = {
    "copy": "it waits for copies; give each slot a whole copy of the model (setting multi_gpu_strategy: replicas), or use larger batches",
    "other slots": "it waits for other slots, because pictures pass from slot to slot; a larger Batch size keeps all slots busy",
    "plan": "the plan was computed; the next job of this size reuses it",
    "load": "models were being loaded; jobs with the same model skip that",
    "save": "pictures were being saved; a faster disk or file format would help",
    "host": "it waits for the rest of the program; a larger Batch size gives it more work at once",
}


def slots_text(slots: Sequence[SlotStatus]) -> list[str]:
    """One line per slot below a header line, in columns."""
    rows: list[tuple[str, ...]] = [("slot", "device", "name", "state", "used", "of", "models on it", "use", "temp.")]
    rows += [_row(slot) for slot in slots]
    columns = [column for column in zip(*rows) if any(cell for cell in column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in zip(*columns)]


def _row(slot: SlotStatus) -> tuple[str, ...]:
    used_bytes = max(0, slot.total_bytes - slot.free_bytes)
    return (
        str(slot.index),
        slot.torch_device,
        slot.name,
        STATES.get(slot.vram_state, slot.vram_state),
        format_bytes(used_bytes),
        format_bytes(slot.total_bytes),
        ", ".join(f"{name} {format_bytes(held_bytes)}" for name, held_bytes in slot.holders),
        "" if slot.utilization is None else f"{slot.utilization} %",
        "" if slot.temperature is None else f"{slot.temperature} °C",
    )


def preview_text(preview: Preview, name: str) -> list[str]:
    """The plan for a checkpoint, slot by slot."""
    plan = preview.plan
    pictures = "1 picture" if preview.images == 1 else f"{preview.images} pictures"
    lines = [f"{name} ({preview.model}), {pictures} of {preview.side_px}x{preview.side_px}: {plan.strategy}. {plan.reason}."]
    lines += [f"  slot {slot}: {format_bytes(size_bytes)} at the peak" for slot, size_bytes in sorted(plan.predicted_bytes.items())]
    return lines


def describe_idleness(plan: PlanStatus | None, slots: Sequence[SlotStatus], *, uses_many: bool, job: JobRecord | None = None) -> str:
    """One sentence about an idle or underused slot, with reason and remedy; empty if there is none. `job` is the profile of the last job."""
    lost = [slot.index for slot in slots if slot.vram_state == "LOST"]
    if lost:
        return f"{_slots(lost)} lost: restart the program to use {'it' if len(lost) == 1 else 'them'} again, and check the driver's log."
    if len(slots) < 2:
        return ""
    if not uses_many:
        return f"Only slot {slots[0].index} computes: start with --multi-gpu to use the others."
    if plan is None:
        return ""
    idle = _idle(plan, slots)
    if idle:
        return f"{_slots(idle)} idle: {plan.reason.rstrip('.')}. {_way_out(plan)}"
    return "" if job is None else _little_used(job)


def _idle(plan: PlanStatus, slots: Sequence[SlotStatus]) -> list[int]:
    """Slots that the plan leaves out or gives no forward."""
    working = {slot for number, stages in enumerate(plan.stages) if number >= len(plan.rows) or plan.rows[number] > 0 for slot in stages}
    return [slot.index for slot in slots if slot.index not in working]


def _way_out(plan: PlanStatus) -> str:
    if "was requested" in plan.reason:
        return "Set multi_gpu_strategy to auto, or remove --multi-gpu-strategy."
    if plan.is_replicated:
        return "A larger Batch size would use it."
    return "Larger pictures or a larger Batch size would use it."


def _little_used(job: JobRecord) -> str:
    slot = min(job.slots, key=lambda one: one.busy_share, default=None)
    if slot is None or slot.busy_share >= LITTLE_USED or not slot.wait_ms_by_cause:
        return ""
    cause = max(slot.wait_ms_by_cause, key=lambda one: _waited(slot, one))
    return f"Slot {slot.slot} was busy for {slot.busy_share:.0%} of the last job. Most of the rest: {_WHAT_WOULD_HELP[cause]}."


def _waited(slot: SlotRecord, cause: str) -> float:
    by_cause: Mapping[str, float] = slot.wait_ms_by_cause
    return by_cause[cause]


def _slots(indices: Sequence[int]) -> str:
    return f"Slot {indices[0]} is" if len(indices) == 1 else f"Slots {', '.join(map(str, indices[:-1]))} and {indices[-1]} are"
