"""Recorders: what is recorded, what is not, and the times of CUDA events. CUDA is a fake that counts milliseconds."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch

from backend import profiler
from backend.devices.slot import Slot
from backend.profiler import NoRecorder, Recorder

CUDA = torch.device("cuda", 0)


def _slot(index: int, device: str) -> Slot:
    return Slot(index=index, torch_device=torch.device(device), name=f"place {index}", total_bytes=2**30)


@pytest.fixture(autouse=True)
def _nothing_runs() -> Any:
    yield
    profiler.end()
    profiler.begin((), is_on=False)


def test_off_records_nothing_and_hands_out_nothing_new() -> None:
    profiler.begin([_slot(0, "cpu")], is_on=False)
    recorder = profiler.recorder()
    assert not recorder.is_on
    assert recorder.measure("VAE", "decode") is recorder.measure("network", "network")
    assert recorder.time_copy(CUDA, CUDA, 1) is recorder.time_copy(CUDA, CUDA, 2)
    recorder.begin_steps()
    recorder.note_step()
    recorder.note_plan(None)
    recorder.add(1, 2, kind="network", name="network", slot=0)
    assert (recorder.step, recorder.next_batch(), profiler.end()) == (-1, -1, None)


def test_a_span_has_its_slot_step_and_times_also_when_the_work_fails() -> None:
    profiler.begin([_slot(3, "cpu"), _slot(4, "cpu")], is_on=True)
    recorder = profiler.recorder()
    recorder.begin_steps()
    recorder.note_step()
    with pytest.raises(ValueError, match="on purpose"), recorder.measure("VAE", "decode", device=torch.device("cpu")):
        raise ValueError("on purpose")
    with recorder.measure("network", "network", device=torch.device("cpu"), slot=4, batch=7, rows=2):
        recorder.end_steps()
    with recorder.measure("save", "save"):
        pass
    recording = profiler.end()
    assert recording is not None
    assert [(span.kind, span.slot, span.batch, span.rows) for span in recording.spans] == [
        ("VAE", 3, -1, 0),
        ("network", 4, 7, 2),
        ("save", None, -1, 0),
    ]
    assert recording.spans[0].step == 1
    for span in recording.spans:
        assert recording.start_ns <= span.start_ns <= span.end_ns <= recording.end_ns
    assert len(recording.step_ends_ns) == 1


def test_spans_over_the_bound_are_counted_and_not_kept() -> None:
    recorder = Recorder([_slot(0, "cpu")], max_spans=3)
    for at_ns in range(5):
        recorder.add(at_ns, at_ns + 1, kind="network", name="network", slot=0)
    recording = recorder.finish()
    assert (len(recording.spans), recording.num_dropped) == (3, 2)


def test_many_threads_lose_no_span_and_no_count() -> None:
    profiler.begin([_slot(0, "cpu")], is_on=True)

    def work() -> None:
        for _ in range(200):
            with profiler.recorder().measure("network", "network", device=torch.device("cpu")):
                profiler.meter().count_stage_run_on(torch.device("cpu"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recording = profiler.end()
    assert recording is not None
    assert (len(recording.spans), profiler.meter().stage_runs[0]) == (800, 800)


class _Event:
    """Passes at a fixed time of its device, in ms."""

    clock_ms = 0.0
    num_synchronized = 0

    def __init__(self, enable_timing: bool = False) -> None:
        self.at_ms: float | None = None
        self.passed = False

    def record(self, stream: object) -> None:
        _Event.clock_ms += 1.0
        self.at_ms = _Event.clock_ms

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        _Event.num_synchronized += 1

    def elapsed_time(self, other: _Event) -> float:
        assert self.at_ms is not None
        assert other.at_ms is not None
        return other.at_ms - self.at_ms


class _Stream:
    def __init__(self, device: torch.device = CUDA) -> None:
        self.device = device


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    _Event.clock_ms, _Event.num_synchronized = 0.0, 0
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: _Stream())


def test_cuda_spans_come_from_events_and_nothing_waits_before_the_end(fake_cuda: None) -> None:
    recorder = Recorder([_slot(0, "cuda:0")])
    for _ in range(100):
        with recorder.measure("network", "network", device=CUDA):
            pass
    assert _Event.num_synchronized == 0
    assert len(recorder._pending) == 100
    for pending in recorder._pending:
        pending.end.passed = pending.start.passed = True
    for _ in range(28):
        with recorder.measure("network", "network", device=CUDA):
            pass
    assert (len(recorder._spans), len(recorder._pending)) == (100, 28)
    recording = Recorder.finish(recorder)
    assert len(recording.spans) == 128
    starts_ns = [pending.start_ns for pending in recorder._spans]
    assert {round((later - sooner) / 1e6) for sooner, later in itertools.pairwise(starts_ns)} == {2}


def test_a_copy_between_cards_is_timed_on_both_streams(fake_cuda: None) -> None:
    recorder = Recorder([_slot(0, "cuda:0"), _slot(1, "cuda:1")])
    timer = recorder.time_copy(CUDA, torch.device("cuda:1"), 512)
    timer.start(_Stream(CUDA))
    timer.stop(_Stream(torch.device("cuda:1")))
    (span,) = recorder.finish().spans
    assert (span.kind, span.slot, span.num_bytes, span.link) == ("copy", 1, 512, "cuda:0 > cuda:1")
    assert set(recorder._anchors) == {CUDA, torch.device("cuda:1")}


def test_spans_of_a_lost_card_are_dropped_and_counted(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder([_slot(0, "cuda:0")])
    with recorder.measure("network", "network", device=CUDA):
        pass

    def lost(event: _Event) -> None:
        raise RuntimeError("the card fell off the bus")

    monkeypatch.setattr(_Event, "synchronize", lost)
    recording = recorder.finish()
    assert (recording.spans, recording.num_dropped) == ((), 1)


def test_a_new_job_resets_the_counts() -> None:
    profiler.begin([_slot(0, "cpu")], is_on=False)
    profiler.meter().count_stage_run(0)
    profiler.meter().count_stage_run(None)
    profiler.meter().num_steps, profiler.meter().sampling_s = 3, 1.5
    assert (dict(profiler.meter().stage_runs), profiler.meter().steps_per_s) == ({0: 1}, 2.0)
    profiler.begin([_slot(0, "cpu")], is_on=False)
    assert (dict(profiler.meter().stage_runs), profiler.meter().steps_per_s) == ({}, None)
    assert isinstance(profiler.recorder(), NoRecorder)
