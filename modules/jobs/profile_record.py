"""The schema of logs/profile.json (documented in docs/profile.md), and the conversion of a recording into one of its jobs.

Knows no files or devices. Times are milliseconds since the job's start unless the name says otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from backend.parallel.planning.plan import Plan
    from backend.parallel.planning.timeline import Lane
    from backend.profiler import Recording, Span

VERSION: Final = 1
TITLE: Final = "profile of a job"
"""By it a timeline.png is known as ours."""
Outcome = Literal["finished", "interrupted", "failed"]


class _Record(BaseModel):
    """Strict: every field is known and required."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RequestRecord(_Record):
    """The request. Prompts are left out, because profiles are meant to be shared."""

    kind: str
    model: str
    width_px: int
    height_px: int
    steps: int
    sampler: str
    scheduler: str
    cfg_scale: float
    batch_size: int
    batch_count: int
    hires: bool


class ReplicaRecord(_Record):
    """One copy of the network: its slots in execution order."""

    stage_slots: list[int]


class PlanRecord(_Record):
    at_ms: float
    strategy: str
    reason: str
    replicas: list[ReplicaRecord]
    lanes: int
    predicted_step_ms: float | None
    predicted_bytes: dict[str, int]


class StepRecord(_Record):
    """`network_ms`: time in which any slot computed the network. `host_end_ms`: when the sampler got the result, None if it did not."""

    step: int
    start_ms: float
    end_ms: float
    network_ms: float
    host_end_ms: float | None


class BatchRecord(_Record):
    """A batch of rows passing through the network."""

    batch: int
    step: int
    rows: int
    start_ms: float
    end_ms: float
    slots: list[int]


class SpanRecord(_Record):
    kind: str
    name: str
    slot: int | None
    start_ms: float
    end_ms: float
    bytes: int
    link: str
    batch: int
    stage: int
    step: int


class WaitRecord(_Record):
    cause: Literal["copy", "other slots", "plan", "load", "save", "host"]
    start_ms: float
    end_ms: float


class PeakRecord(_Record):
    """Peak bytes of the job: in tensors, reserved by the allocator, and of the whole GPU according to the driver. None if unknown."""

    allocated_bytes: int | None
    reserved_bytes: int | None
    driver_bytes: int | None


class SlotRecord(_Record):
    """One slot. `busy_ms` and `wait_ms` add up to the job's `wall_ms`. `busy_share` is relative to wall time; `driver_utilization_percent` is the
    mean of the driver's samples. Virtual GPUs count `operations`."""

    slot: int
    name: str
    device: str
    stage_runs: int
    busy_ms: float
    busy_share: float
    busy_ms_by_kind: dict[str, float]
    wait_ms: float
    wait_ms_by_cause: dict[str, float]
    waits: list[WaitRecord]
    peak: PeakRecord
    driver_utilization_percent: float | None
    operations: int | None


class LinkRecord(_Record):
    link: str
    copies: int
    bytes: int
    copy_ms: float


class CommunicationRecord(_Record):
    """`exposed_ms`: time in which a slot was idle while waiting for a copy to it."""

    copy_ms: float
    exposed_ms: float
    exposed_share: float | None


class SampleRecord(_Record):
    """The driver's values for a slot's GPU."""

    at_ms: float
    slot: int
    utilization_percent: int | None
    used_bytes: int
    power_watts: float | None
    temperature_celsius: int | None


class PredictionRecord(_Record):
    """Predicted step time and bytes of the last plan against actual values. `measured_step_ms` is the median time between host ends."""

    predicted_step_ms: float | None
    measured_step_ms: float | None
    predicted_bytes: dict[str, int]
    measured_bytes: dict[str, int]


class JobRecord(_Record):
    id: str
    started_at: str
    outcome: Outcome
    error: str | None
    wall_ms: float
    request: RequestRecord
    plans: list[PlanRecord]
    prediction: PredictionRecord
    communication: CommunicationRecord
    slots: list[SlotRecord]
    links: list[LinkRecord]
    steps: list[StepRecord]
    batches: list[BatchRecord]
    spans: list[SpanRecord]
    samples: list[SampleRecord]
    dropped_spans: int


class ProfileFile(_Record):
    """The whole file; the newest job is last."""

    version: Literal[1] = VERSION
    program: str
    jobs: list[JobRecord] = Field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotFigures:
    """Facts about a slot other than its spans."""

    slot: int
    name: str
    device: str
    peak: PeakRecord
    operations: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFacts:
    """Facts about a job other than its spans."""

    id: str
    started_at: str
    outcome: Outcome
    error: str | None
    request: RequestRecord
    slots: Sequence[SlotFigures]
    samples: Sequence[SampleRecord] = ()


def build_job(recording: Recording, facts: JobFacts) -> JobRecord:
    """The job as stored in the file."""
    from backend.parallel.planning.timeline import communication_of, lanes_of, steps_of  # imports torch

    clock = _Clock(recording.start_ns)
    lanes = lanes_of(recording, [slot.slot for slot in facts.slots])
    communication = communication_of(recording, lanes)
    plans = [_plan_record(clock.ms(at_ns), plan, facts.slots) for at_ns, plan in recording.plans]
    ends_ms = [clock.ms(end_ns) for end_ns in recording.step_ends_ns]
    return JobRecord(
        id=facts.id,
        started_at=facts.started_at,
        outcome=facts.outcome,
        error=facts.error,
        wall_ms=clock.ms(recording.end_ns),
        request=facts.request,
        plans=plans,
        prediction=_prediction(plans, ends_ms, facts.slots),
        communication=CommunicationRecord(
            copy_ms=communication.copy_ns / 1e6, exposed_ms=communication.exposed_ns / 1e6, exposed_share=communication.exposed_share
        ),
        slots=[_slot_record(clock, recording, lane, figures, facts.samples) for lane, figures in zip(lanes, facts.slots)],
        links=_link_records(recording.spans),
        steps=[
            StepRecord(
                step=step.step,
                start_ms=clock.ms(step.start_ns),
                end_ms=clock.ms(step.end_ns),
                network_ms=step.network_ns / 1e6,
                host_end_ms=ends_ms[step.step] if 0 <= step.step < len(ends_ms) else None,
            )
            for step in steps_of(recording)
        ],
        batches=_batch_records(clock, recording.spans),
        spans=[_span_record(clock, span) for span in recording.spans],
        samples=list(facts.samples),
        dropped_spans=recording.num_dropped,
    )


@dataclass(frozen=True, slots=True)
class _Clock:
    start_ns: int

    def ms(self, at_ns: int) -> float:
        return (at_ns - self.start_ns) / 1e6


def _plan_record(at_ms: float, plan: Plan | None, slots: Sequence[SlotFigures]) -> PlanRecord:
    if plan is None:
        alone = [ReplicaRecord(stage_slots=[slots[0].slot])] if slots else []
        reason = "There is one slot, which computes everything."
        return PlanRecord(at_ms=at_ms, strategy="single", reason=reason, replicas=alone, lanes=1, predicted_step_ms=None, predicted_bytes={})
    return PlanRecord(
        at_ms=at_ms,
        strategy=plan.strategy,
        reason=plan.reason,
        replicas=[ReplicaRecord(stage_slots=[stage.slot for stage in replica.stages]) for replica in plan.replicas],
        lanes=plan.lanes,
        predicted_step_ms=plan.predicted_ms or None,
        predicted_bytes={str(slot): size_bytes for slot, size_bytes in plan.predicted_bytes.items()},
    )


def _prediction(plans: Sequence[PlanRecord], ends_ms: Sequence[float], slots: Sequence[SlotFigures]) -> PredictionRecord:
    steps_ms = sorted(end - start for start, end in pairwise(ends_ms))
    return PredictionRecord(
        predicted_step_ms=plans[-1].predicted_step_ms if plans else None,
        measured_step_ms=steps_ms[len(steps_ms) // 2] if steps_ms else None,
        predicted_bytes=plans[-1].predicted_bytes if plans else {},
        measured_bytes={str(slot.slot): slot.peak.allocated_bytes for slot in slots if slot.peak.allocated_bytes is not None},
    )


def _slot_record(clock: _Clock, recording: Recording, lane: Lane, figures: SlotFigures, samples: Sequence[SampleRecord]) -> SlotRecord:
    wall_ns = recording.end_ns - recording.start_ns
    told = [sample.utilization_percent for sample in samples if sample.slot == lane.slot and sample.utilization_percent is not None]
    waits = lane.wait_ns
    return SlotRecord(
        slot=lane.slot,
        name=figures.name,
        device=figures.device,
        stage_runs=lane.num_stage_runs,
        busy_ms=lane.busy_ns / 1e6,
        busy_share=lane.busy_ns / wall_ns if wall_ns else 0.0,
        busy_ms_by_kind=_by_kind(recording.spans, lane.slot),
        wait_ms=sum(waits.values()) / 1e6,
        wait_ms_by_cause={cause: spent_ns / 1e6 for cause, spent_ns in waits.items()},
        waits=[WaitRecord(cause=wait.cause, start_ms=clock.ms(wait.start_ns), end_ms=clock.ms(wait.end_ns)) for wait in lane.waits],
        peak=figures.peak,
        driver_utilization_percent=sum(told) / len(told) if told else None,
        operations=figures.operations,
    )


def _by_kind(spans: Sequence[Span], slot: int) -> dict[str, float]:
    by_kind: dict[str, float] = defaultdict(float)
    for span in spans:
        if span.slot == slot and span.kind != "copy":
            by_kind[span.kind] += (span.end_ns - span.start_ns) / 1e6
    return dict(by_kind)


def _link_records(spans: Sequence[Span]) -> list[LinkRecord]:
    by_link: Mapping[str, list[Span]] = defaultdict(list)
    for span in spans:
        if span.kind == "copy":
            by_link[span.link].append(span)
    return [
        LinkRecord(
            link=link,
            copies=len(copies),
            bytes=sum(copy.num_bytes for copy in copies),
            copy_ms=sum(copy.end_ns - copy.start_ns for copy in copies) / 1e6,
        )
        for link, copies in sorted(by_link.items())
    ]


def _batch_records(clock: _Clock, spans: Sequence[Span]) -> list[BatchRecord]:
    by_batch: Mapping[int, list[Span]] = defaultdict(list)
    for span in spans:
        if span.batch >= 0:
            by_batch[span.batch].append(span)
    return [
        BatchRecord(
            batch=batch,
            step=parts[0].step,
            rows=parts[0].rows,
            start_ms=clock.ms(min(part.start_ns for part in parts)),
            end_ms=clock.ms(max(part.end_ns for part in parts)),
            slots=list(dict.fromkeys(part.slot for part in parts if part.slot is not None)),
        )
        for batch, parts in sorted(by_batch.items())
    ]


def _span_record(clock: _Clock, span: Span) -> SpanRecord:
    return SpanRecord(
        kind=span.kind,
        name=span.name,
        slot=span.slot,
        start_ms=clock.ms(span.start_ns),
        end_ms=clock.ms(span.end_ns),
        bytes=span.num_bytes,
        link=span.link,
        batch=span.batch,
        stage=span.stage,
        step=span.step,
    )
