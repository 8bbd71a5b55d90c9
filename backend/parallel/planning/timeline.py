"""Turns the spans of a recording into each slot's time: when it was busy, and what it waited for when it was not. Pure; knows no devices.

A slot's busy and waiting times cover the recording without gap or overlap. An idle moment is attributed to the first of these that applies:
a copy to that slot is in progress; another slot computes; the host plans, loads or saves; the host does something else (guidance, sampler, Python).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from backend.profiler import Recording, Span

Interval = tuple[int, int]
WaitCause = Literal["copy", "other slots", "plan", "load", "save", "host"]
HOST_KINDS: tuple[Literal["plan", "load", "save"], ...] = ("plan", "load", "save")
NETWORK_KINDS = ("network", "stage")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    cause: WaitCause
    start_ns: int
    end_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """One slot's time. `busy` intervals are disjoint and in order; `waits` cover the rest of the recording, in order."""

    slot: int
    busy: tuple[Interval, ...]
    waits: tuple[Wait, ...]
    num_stage_runs: int

    @property
    def busy_ns(self) -> int:
        return total(self.busy)

    @property
    def wait_ns(self) -> dict[WaitCause, int]:
        by_cause: dict[WaitCause, int] = defaultdict(int)
        for wait in self.waits:
            by_cause[wait.cause] += wait.end_ns - wait.start_ns
        return dict(by_cause)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The network's part of a sampler step: from the start of its first row to the end of its last, and how long any slot computed."""

    step: int
    start_ns: int
    end_ns: int
    network_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Communication:
    """Time that copies to slots took, and the part of it in which the receiving slot was idle."""

    copy_ns: int
    exposed_ns: int

    @property
    def exposed_share(self) -> float | None:
        return self.exposed_ns / self.copy_ns if self.copy_ns else None


# intervals: disjoint, in order, half open


def union(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return tuple(merged)


def intersect(one: Sequence[Interval], other: Sequence[Interval]) -> tuple[Interval, ...]:
    found: list[Interval] = []
    left = right = 0
    while left < len(one) and right < len(other):
        start, end = max(one[left][0], other[right][0]), min(one[left][1], other[right][1])
        if start < end:
            found.append((start, end))
        if one[left][1] < other[right][1]:
            left += 1
        else:
            right += 1
    return tuple(found)


def subtract(one: Sequence[Interval], other: Sequence[Interval]) -> tuple[Interval, ...]:
    """The parts of `one` that are not in `other`."""
    if not one:
        return ()
    edges = [one[0][0], *(edge for interval in other for edge in interval), one[-1][1]]
    outside = union((start, end) for start, end in zip(edges[::2], edges[1::2]))
    return intersect(one, outside)


def total(intervals: Iterable[Interval]) -> int:
    return sum(end - start for start, end in intervals)


# a recording


def lanes_of(recording: Recording, slots: Sequence[int]) -> tuple[Lane, ...]:
    """A lane for every slot, in the order of `slots`."""
    busy = {slot: union(_times(span for span in recording.spans if span.slot == slot and span.kind != "copy")) for slot in slots}
    return tuple(_lane(recording, slot, busy) for slot in slots)


def _lane(recording: Recording, slot: int, busy: dict[int, tuple[Interval, ...]]) -> Lane:
    left = subtract(((recording.start_ns, recording.end_ns),), busy[slot])
    waits: list[Wait] = []
    for cause, times in _causes(recording, slot, busy):
        waits += [Wait(cause=cause, start_ns=start, end_ns=end) for start, end in intersect(left, times)]
        left = subtract(left, times)
    waits += [Wait(cause="host", start_ns=start, end_ns=end) for start, end in left]
    num_stage_runs = sum(span.slot == slot and span.kind in NETWORK_KINDS for span in recording.spans)
    return Lane(slot=slot, busy=busy[slot], waits=tuple(sorted(waits, key=lambda wait: wait.start_ns)), num_stage_runs=num_stage_runs)


def _causes(recording: Recording, slot: int, busy: dict[int, tuple[Interval, ...]]) -> list[tuple[WaitCause, tuple[Interval, ...]]]:
    others = union(interval for other, intervals in busy.items() if other != slot for interval in intervals)
    return [
        ("copy", _copies_to(recording, slot)),
        ("other slots", others),
        *((kind, union(_times(span for span in recording.spans if span.kind == kind))) for kind in HOST_KINDS),
    ]


def _copies_to(recording: Recording, slot: int) -> tuple[Interval, ...]:
    return union(_times(span for span in recording.spans if span.kind == "copy" and span.slot == slot))


def _times(spans: Iterable[Span]) -> Iterable[Interval]:
    return ((span.start_ns, span.end_ns) for span in spans)


def communication_of(recording: Recording, lanes: Sequence[Lane]) -> Communication:
    copy_ns = exposed_ns = 0
    for lane in lanes:
        copies = _copies_to(recording, lane.slot)
        copy_ns += total(copies)
        exposed_ns += total(subtract(copies, lane.busy))
    return Communication(copy_ns=copy_ns, exposed_ns=exposed_ns)


def steps_of(recording: Recording) -> tuple[Step, ...]:
    """Every step in which the network ran, by its number."""
    by_step: dict[int, list[Span]] = defaultdict(list)
    for span in recording.spans:
        if span.kind in NETWORK_KINDS:
            by_step[span.step].append(span)
    return tuple(_step(by_step[step]) for step in sorted(by_step))


def _step(spans: Sequence[Span]) -> Step:
    return Step(
        step=spans[0].step,
        start_ns=min(span.start_ns for span in spans),
        end_ns=max(span.end_ns for span in spans),
        network_ns=total(union(_times(spans))),
    )
