"""Records what the slots did in a job, and when: spans of work and of copies, collected while the job runs and returned at its end.

When off (the default), a recorder's `is_on` is False and its other methods do nothing. When on, a span costs two clock readings, or on CUDA two
events in the device's current stream, whose times are read later: nothing here ever waits for a device while a job runs.

A meter counts what is cheap enough to count always. Knows no jobs, settings, files or pages.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

import torch

from backend.devices.slot import Slot, canonical_device

if TYPE_CHECKING:
    from backend.parallel.planning.plan import Plan

Kind = Literal["network", "stage", "text encoder", "ControlNet", "VAE", "copy", "plan", "load", "save"]
Mark = Any
"""A point in time: nanoseconds of `time.perf_counter_ns`, or an event recorded on a CUDA stream."""

MAX_SPANS = 100_000
_RESOLVE_EVERY = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Something that took time. `slot` None is the host. Times come from `time.perf_counter_ns`.

    `batch` says which batch of rows the span belongs to, `stage` how many stages that batch had passed, `step` is the sampler's step (each -1 if
    there is none). `num_bytes` and `link` ("cuda:0 > cuda:1") are for copies.
    """

    kind: Kind
    name: str
    slot: int | None
    start_ns: int
    end_ns: int
    num_bytes: int = 0
    link: str = ""
    batch: int = -1
    stage: int = -1
    step: int = -1
    rows: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Everything recorded from `start_ns` to `end_ns`, with spans in the order of their starts. `step_ends_ns` are host times.

    `plans`: the plans that took effect, and when; None is one slot without a plan. `num_dropped` spans were lost because the list was full.
    """

    start_ns: int
    end_ns: int
    spans: tuple[Span, ...]
    step_ends_ns: tuple[int, ...]
    plans: tuple[tuple[int, Plan | None], ...]
    num_dropped: int


def mark_now(device: torch.device) -> Mark:
    """The current point in the calling thread's work: on CUDA when the device's current stream gets here, else now."""
    return mark_stream(torch.cuda.current_stream(device)) if device.type == "cuda" else time.perf_counter_ns()


def mark_stream(stream: Any) -> Mark:
    event_type: Any = torch.cuda.Event
    event = event_type(enable_timing=True)
    event.record(stream)
    return event


class NoTimer:
    """Times nothing."""

    def start(self, stream: Any = None) -> None:
        """Does nothing."""

    def stop(self, stream: Any = None) -> None:
        """Does nothing."""


NO_TIMER = NoTimer()


class CopyTimer(NoTimer):
    """Times one copy, on the given streams, else by the clock."""

    def __init__(self, recorder: Recorder, source: torch.device, target: torch.device, num_bytes: int) -> None:
        self._recorder, self._source, self._target, self._num_bytes = recorder, source, target, num_bytes
        self._started: Mark = 0
        self._start_device = source

    def start(self, stream: Any = None) -> None:
        self._start_device = self._source if stream is None else stream.device
        self._started = time.perf_counter_ns() if stream is None else self._recorder.mark_on(stream)

    def stop(self, stream: Any = None) -> None:
        ended = time.perf_counter_ns() if stream is None else self._recorder.mark_on(stream)
        facts = {"kind": "copy", "name": "copy", "num_bytes": self._num_bytes, "link": f"{self._source} > {self._target}"}
        slot = self._recorder.slot_of(self._target)
        end_device = self._target if stream is None else stream.device
        self._recorder.add(self._started, ended, devices=(self._start_device, end_device), slot=slot, **facts)


class NoRecorder:
    """Records nothing, at no cost."""

    is_on = False
    step = -1
    _nothing = nullcontext()

    def measure(self, kind: Kind, name: str, **facts: Any) -> AbstractContextManager[None]:
        return self._nothing

    def mark(self, device: torch.device) -> Mark:
        return mark_now(device)

    def time_copy(self, source: torch.device, target: torch.device, num_bytes: int) -> NoTimer:
        return NO_TIMER

    def add(self, start: Mark, end: Mark, **facts: Any) -> None:
        """Does nothing."""

    def note_plan(self, plan: Plan | None) -> None:
        """Does nothing."""

    def begin_steps(self) -> None:
        """Does nothing."""

    def note_step(self) -> None:
        """Does nothing."""

    def end_steps(self) -> None:
        """Does nothing."""

    def next_batch(self) -> int:
        return -1


@dataclass(slots=True)
class _Pending:
    """A span whose CUDA events may not have passed yet."""

    start: Mark
    end: Mark
    devices: tuple[torch.device, torch.device]
    facts: dict[str, Any]

    def has_passed(self) -> bool:
        return all(isinstance(mark, int) or mark.query() for mark in (self.start, self.end))

    def wait(self) -> None:
        for mark in (self.start, self.end):
            if not isinstance(mark, int):
                mark.synchronize()


class Recorder(NoRecorder):
    """Records from its creation until `finish`. Thread-safe. Keeps at most `max_spans` spans."""

    is_on = True

    def __init__(self, slots: Sequence[Slot], *, max_spans: int = MAX_SPANS) -> None:
        self.slots = tuple(slots)
        self._slot_of_device = _slots_by_device(slots)
        self._max_spans = max_spans
        self._spans: list[Span] = []
        self._pending: deque[_Pending] = deque()
        self._anchors: dict[torch.device, tuple[Any, int]] = {}
        self._step_ends_ns: list[int] = []
        self._plans: list[tuple[int, Plan | None]] = []
        self._num_dropped = 0
        self._batches = count()
        self._lock = threading.Lock()
        self._start_ns = time.perf_counter_ns()

    def slot_of(self, device: torch.device) -> int | None:
        """The first slot on a device; None if the device has no slot."""
        return self._slot_of_device.get(canonical_device(device))

    @contextmanager
    def _measure(self, kind: Kind, name: str, device: torch.device | None, slot: int | None, facts: dict[str, Any]) -> Iterator[None]:
        where = torch.device("cpu") if device is None else device
        start = self.mark(where)
        try:
            yield
        finally:
            slot = slot if slot is not None or device is None else self.slot_of(device)
            self.add(start, self.mark(where), devices=(where, where), kind=kind, name=name, slot=slot, **facts)

    def measure(self, kind: Kind, name: str, *, device: torch.device | None = None, slot: int | None = None, **facts: Any) -> Any:
        """Record a span around a block, on the device's current stream (None: the host), even if the block raises."""
        return self._measure(kind, name, device, slot, facts)

    def mark(self, device: torch.device) -> Mark:
        if device.type == "cuda":
            self._anchor(device)
        return mark_now(device)

    def mark_on(self, stream: Any) -> Mark:
        self._anchor(stream.device)
        return mark_stream(stream)

    def time_copy(self, source: torch.device, target: torch.device, num_bytes: int) -> CopyTimer:
        return CopyTimer(self, source, target, num_bytes)

    def next_batch(self) -> int:
        return next(self._batches)

    def note_plan(self, plan: Plan | None) -> None:
        """Note that a plan takes effect now."""
        self._plans.append((time.perf_counter_ns(), plan))

    def begin_steps(self) -> None:
        """Sampling begins: spans that start from now on belong to the next step. Steps are numbered across all passes of the job."""
        self.step = len(self._step_ends_ns)

    def note_step(self) -> None:
        """The sampler has finished a step, or was interrupted in it."""
        self._step_ends_ns.append(time.perf_counter_ns())
        self.step = len(self._step_ends_ns)

    def end_steps(self) -> None:
        """Sampling is over."""
        self.step = -1

    def add(self, start: Mark, end: Mark, *, devices: tuple[torch.device, torch.device] | None = None, **facts: Any) -> None:
        """Add a span between two marks, which were made on `devices`."""
        facts.setdefault("step", self.step)
        for device in devices or ():
            if device.type == "cuda":
                self._anchor(device)
        with self._lock:
            if len(self._spans) + len(self._pending) >= self._max_spans:
                self._num_dropped += 1
            elif isinstance(start, int) and isinstance(end, int):
                self._spans.append(Span(start_ns=start, end_ns=end, **facts))
            else:
                assert devices is not None
                self._pending.append(_Pending(start, end, devices, facts))
                if len(self._pending) % _RESOLVE_EVERY == 0:
                    self._resolve_passed()

    def finish(self) -> Recording:
        """End the recording and read the remaining events. Waits for them, so the job's work must be over."""
        end_ns = time.perf_counter_ns()
        with self._lock:
            while self._pending:
                self._resolve_last(self._pending.popleft())
            spans = sorted(self._spans, key=lambda span: span.start_ns)
        return Recording(
            start_ns=self._start_ns,
            end_ns=end_ns,
            spans=tuple(_clip(span, self._start_ns, end_ns) for span in spans),
            step_ends_ns=tuple(self._step_ends_ns),
            plans=tuple(self._plans),
            num_dropped=self._num_dropped,
        )

    def _resolve_passed(self) -> None:
        """Read the events that have passed, oldest first, without waiting. The caller holds the lock."""
        while self._pending and self._pending[0].has_passed():
            self._resolve(self._pending.popleft())

    def _resolve_last(self, pending: _Pending) -> None:
        """Wait for a span's events and read them. A lost device no longer answers; its spans are dropped."""
        try:
            pending.wait()
            self._resolve(pending)
        except RuntimeError:
            self._num_dropped += 1

    def _resolve(self, pending: _Pending) -> None:
        start_ns, end_ns = (self._read(mark, device) for mark, device in zip((pending.start, pending.end), pending.devices))
        self._spans.append(Span(start_ns=start_ns, end_ns=max(start_ns, end_ns), **pending.facts))

    def _read(self, mark: Mark, device: torch.device) -> int:
        if isinstance(mark, int):
            return mark
        event, at_ns = self._anchors[device]
        return at_ns + int(event.elapsed_time(mark) * 1e6)

    def _anchor(self, device: torch.device) -> None:
        """Record an event with known host time, the reference for its device's other events. It passes at once, on a separate idle stream."""
        with self._lock:
            if device not in self._anchors:
                stream_type: Any = torch.cuda.Stream
                event = mark_stream(stream_type(device=device))
                self._anchors[device] = (event, time.perf_counter_ns())


def _clip(span: Span, start_ns: int, end_ns: int) -> Span:
    """Cut off what lies outside the recording because of an anchor's error."""
    if start_ns <= span.start_ns and span.end_ns <= end_ns:
        return span
    first = min(max(span.start_ns, start_ns), end_ns)
    return replace(span, start_ns=first, end_ns=min(max(span.end_ns, first), end_ns))


def _slots_by_device(slots: Sequence[Slot]) -> dict[torch.device, int]:
    first: dict[torch.device, int] = {}
    for slot in slots:
        first.setdefault(canonical_device(slot.torch_device), slot.index)
    return first


@dataclass(slots=True)
class Meter:
    """Counts kept in every job: runs of stages (or of the whole network) by slot, steps, and the time spent sampling."""

    slots: tuple[Slot, ...] = ()
    stage_runs: Counter[int] = field(default_factory=Counter)
    num_steps: int = 0
    sampling_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _slot_of_device: dict[torch.device, int | None] = field(default_factory=dict)

    def count_stage_run(self, slot: int | None) -> None:
        """Count that a slot ran its part of the network."""
        if slot is not None:
            with self._lock:
                self.stage_runs[slot] += 1

    def count_stage_run_on(self, device: torch.device) -> None:
        if device not in self._slot_of_device:
            self._slot_of_device[device] = _slots_by_device(self.slots).get(canonical_device(device))
        self.count_stage_run(self._slot_of_device[device])

    @property
    def steps_per_s(self) -> float | None:
        return self.num_steps / self.sampling_s if self.sampling_s > 0 and self.num_steps else None


@dataclass(slots=True)
class _Now:
    recorder: NoRecorder = field(default_factory=NoRecorder)
    meter: Meter = field(default_factory=Meter)


_now = _Now()


def recorder() -> NoRecorder:
    """The running job's recorder: a `Recorder`, or one that does nothing."""
    return _now.recorder


def meter() -> Meter:
    """The counts of the running job, or of the last one."""
    return _now.meter


def begin(slots: Sequence[Slot], *, is_on: bool) -> None:
    """A job begins: reset the counts, and record the job if `is_on`."""
    _now.meter = Meter(tuple(slots))
    _now.recorder = Recorder(slots) if is_on else NoRecorder()


def end() -> Recording | None:
    """The job is over; return what was recorded."""
    finished, _now.recorder = _now.recorder, NoRecorder()
    return finished.finish() if isinstance(finished, Recorder) else None
