"""The slots' time computed from spans: by example, and by property against a count of single nanoseconds."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.parallel.planning.timeline import communication_of, intersect, lanes_of, steps_of, subtract, total, union
from backend.profiler import Recording, Span

END_NS = 60
intervals = st.lists(st.tuples(st.integers(0, END_NS), st.integers(0, END_NS)).map(sorted).map(tuple), max_size=8)


def _recording(*spans: Span) -> Recording:
    ordered = tuple(sorted(spans, key=lambda span: span.start_ns))
    return Recording(start_ns=0, end_ns=END_NS, spans=ordered, step_ends_ns=(), plans=(), num_dropped=0)


def _span(kind: str, slot: int | None, start_ns: int, end_ns: int, step: int = -1) -> Span:
    return Span(kind=kind, name=kind, slot=slot, start_ns=start_ns, end_ns=end_ns, step=step)  # type: ignore[arg-type]


@given(intervals, intervals)
def test_sets_of_intervals_are_sets_of_nanoseconds(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    def points(some: object) -> set[int]:
        return {point for start, end in some for point in range(start, end)}  # type: ignore[attr-defined]

    left, right = union(one), union(other)
    assert points(left) == points(one)
    assert total(left) == len(points(one))
    assert points(intersect(left, right)) == points(one) & points(other)
    assert points(subtract(left, right)) == points(one) - points(other)


_spans = st.builds(
    lambda kind, slot, ends: _span(kind, slot, min(ends), max(ends)),
    st.sampled_from(["network", "stage", "VAE", "text encoder", "copy", "load", "save", "plan"]),
    st.sampled_from([0, 1, 2, None]),
    st.tuples(st.integers(0, END_NS), st.integers(0, END_NS)),
)


@given(st.lists(_spans, max_size=12))
def test_busy_and_waiting_times_cover_the_recording_once(spans: list[Span]) -> None:
    recording = _recording(*spans)
    for lane in lanes_of(recording, [0, 1, 2]):
        pieces = sorted([*lane.busy, *((wait.start_ns, wait.end_ns) for wait in lane.waits)])
        assert pieces[0][0] == 0
        assert pieces[-1][1] == END_NS
        assert all(sooner[1] == later[0] for sooner, later in itertools.pairwise(pieces))
        assert lane.busy_ns + sum(lane.wait_ns.values()) == END_NS


def test_a_wait_is_put_down_to_the_first_cause_there_is() -> None:
    recording = _recording(
        _span("network", 0, 0, 20), _span("copy", 1, 15, 25), _span("network", 1, 25, 40), _span("load", None, 10, 18), _span("save", None, 50, 55)
    )  # fmt: skip
    first, second = lanes_of(recording, [0, 1])
    assert first.wait_ns == {"other slots": 15, "host": 20, "save": 5}
    assert second.wait_ns == {"other slots": 15, "copy": 10, "save": 5, "host": 15}
    assert (first.num_stage_runs, second.num_stage_runs) == (1, 1)


def test_communication_that_overlaps_computation_is_hidden() -> None:
    recording = _recording(_span("network", 1, 0, 20), _span("copy", 1, 10, 30), _span("copy", 0, 0, 5), _span("copy", None, 0, 60))
    seen = communication_of(recording, lanes_of(recording, [0, 1]))
    assert (seen.copy_ns, seen.exposed_ns, seen.exposed_share) == (25, 15, 0.6)
    silent = communication_of(_recording(), lanes_of(_recording(), [0]))
    assert silent.exposed_share is None


def test_a_step_lasts_from_its_first_row_to_its_last() -> None:
    recording = _recording(_span("stage", 0, 0, 10, 0), _span("stage", 1, 8, 12, 0), _span("network", 0, 30, 40, 1), _span("stage", 1, 20, 25, 0))
    first, second = steps_of(recording)
    assert (first.step, first.start_ns, first.end_ns, first.network_ns) == (0, 0, 25, 17)
    assert (second.step, second.network_ns) == (1, 10)


def test_overlapping_work_of_one_slot_counts_once() -> None:
    (lane,) = lanes_of(_recording(_span("network", 0, 0, 30), _span("VAE", 0, 20, 40)), [0])
    assert lane.busy_ns == 40


@pytest.mark.parametrize("slots", [[], [5]])
def test_slots_without_spans_only_wait(slots: list[int]) -> None:
    assert [lane.wait_ns for lane in lanes_of(_recording(), slots)] == [{"host": END_NS}] * len(slots)
