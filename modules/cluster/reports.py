"""What a worker says about itself, read with suspicion: a worker is another machine, and may be damaged or out of date.

Nothing here uses a worker's clock: the front notes when it received a report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modules.cluster.values import MessageError

MAX_SLOTS, MAX_NAMES, MAX_TEXT = 256, 10_000, 500


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotReport:
    """A slot of a worker. `utilization` in percent, None if unknown."""

    index: int
    device: str
    name: str
    total_bytes: int
    free_bytes: int
    utilization: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerReport:
    """A worker: its machine, what it has loaded and does. `checkpoint` is the key that orders for the loaded model have, `checkpoint_name` the name
    of its file; both are empty if nothing is loaded."""

    worker: str
    machine: str
    address: str
    versions: Mapping[str, str]
    pid: int = 0
    slots: tuple[SlotReport, ...] = ()
    checkpoint: str = ""
    checkpoint_name: str = ""
    networks: frozenset[str] = frozenset()
    plan: str = ""
    running: str = ""
    num_done: int = 0
    step_ms: float | None = None
    free_disk_bytes: int | None = None

    @property
    def largest_slot_bytes(self) -> int:
        return max((slot.total_bytes for slot in self.slots), default=0)


def read_report(raw: Any) -> WorkerReport:
    """Raises MessageError for anything that is not a report; what is too long is cut."""
    if not isinstance(raw, Mapping):
        raise MessageError(f"report: expected a mapping, got {type(raw).__name__}.")
    versions, slots, networks = raw.get("versions"), raw.get("slots"), raw.get("networks")
    if not isinstance(versions, Mapping) or not isinstance(slots, (list, tuple)) or not isinstance(networks, (list, tuple)):
        raise MessageError("report: versions, slots or networks are missing.")
    worker = _text(raw.get("worker"))
    if not worker:
        raise MessageError("report: the worker has no name.")
    return WorkerReport(
        worker=worker,
        machine=_text(raw.get("machine")) or worker,
        address=_text(raw.get("address")),
        versions={_text(name): _text(value) for name, value in list(versions.items())[:MAX_NAMES]},
        pid=int(_number(raw.get("pid")) or 0),
        slots=tuple(_read_slot(slot, index) for index, slot in enumerate(slots[:MAX_SLOTS])),
        checkpoint=_text(raw.get("checkpoint")),
        checkpoint_name=_text(raw.get("checkpoint_name")),
        networks=frozenset(_text(name) for name in networks[:MAX_NAMES]),
        plan=_text(raw.get("plan")),
        running=_text(raw.get("running")),
        num_done=int(_number(raw.get("num_done")) or 0),
        step_ms=_number(raw.get("step_ms")),
        free_disk_bytes=None if (free := _number(raw.get("free_disk_bytes"))) is None else int(free),
    )


def _read_slot(raw: Any, index: int) -> SlotReport:
    if not isinstance(raw, Mapping):
        raise MessageError(f"report: slot {index} is not a mapping.")
    total_bytes = int(_number(raw.get("total_bytes")) or 0)
    return SlotReport(
        index=index,
        device=_text(raw.get("device")),
        name=_text(raw.get("name")),
        total_bytes=total_bytes,
        free_bytes=min(total_bytes, int(_number(raw.get("free_bytes")) or 0)),
        utilization=_number(raw.get("utilization")),
    )


def _text(value: Any) -> str:
    """One printable line."""
    text = value if isinstance(value, str) else ""
    return "".join(char if char.isprintable() else " " for char in text[:MAX_TEXT])


def _number(value: Any) -> float | None:
    """A finite number, not below 0; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    number = float(value) if abs(value) < 1e18 else math.inf
    return number if math.isfinite(number) and number >= 0 else None
