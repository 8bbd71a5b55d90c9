"""Cuts whose slots are too small for their layers: what stays, what streams, how long that takes, and when it pays.

References: sums of this file; `BLOCKS` made-up pieces of 1 GB each.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.parallel.planning.candidate import JobShape
from backend.parallel.planning.costs import ComponentCost, ModelProfile
from backend.parallel.planning.cut_costs import STREAM_SLACK, PartitionJob
from backend.parallel.planning.partition import partition
from backend.parallel.planning.pipeline import StepRows
from backend.parallel.planning.plan import Piece, Plan, ReplicaPlan, StreamedWeights
from backend.parallel.planning.planner import make_plan
from backend.parallel.planning.slot_facts import SlotFacts
from tests.support.parallel_costs import GB, ROW_MS, fast_links, make_profile, make_slot

BLOCKS = 8
LAYER = GB // 20
HOST = GB / 100.0
"""Bytes per ms from main memory: a GB takes as long as a row, 100 ms."""
ONE_ROW = JobShape(images=1, branches=1)


def made_of_layers(profile: ModelProfile) -> ModelProfile:
    return replace(profile, pieces=tuple(replace(cost, largest_layer_bytes=LAYER) for cost in profile.pieces))


NETWORK = made_of_layers(make_profile([1.0] * BLOCKS, [GB] * BLOCKS))


def slots_of(*sizes_gb: float, speeds: tuple[float, ...] = (), **facts: object) -> list[SlotFacts]:
    speeds = speeds or (1.0,) * len(sizes_gb)
    sizes = [int(size * GB) for size in sizes_gb]
    return [
        make_slot(NETWORK, index, speed=speed, budget_bytes=size, total_bytes=size, **{"host_bytes_per_ms": HOST, **facts})
        for index, (size, speed) in enumerate(zip(sizes, speeds))
    ]


def plan_for(slots: list[SlotFacts], strategy: str = "auto", job: JobShape = ONE_ROW) -> Plan:
    plan = make_plan(NETWORK, slots, fast_links(len(slots)), job, strategy=strategy)  # type: ignore[arg-type]
    assert all(plan.predicted_bytes[slot.index] <= slot.budget_bytes for slot in slots)
    return plan


def streamed_gb(plan: Plan) -> float:
    return sum(one.streamed_bytes for one in plan.streamed.values()) / GB


def test_what_two_slots_nearly_hold_streams_the_rest_of_its_own_stage() -> None:
    """8 GB over 2 x 3.8 GB: 0.4 GB too much, and each slot leaves 3 % of itself and a layer of 0.05 GB free."""
    plan = plan_for(slots_of(3.8, 3.8))
    assert (plan.strategy, set(plan.used_slots)) == ("layers", {0, 1})
    assert streamed_gb(plan) == pytest.approx(8 - 2 * (3.8 * (1 - STREAM_SLACK) - LAYER / GB), abs=0.001)
    assert plan.predicted_ms == pytest.approx(ROW_MS + 100 * streamed_gb(plan), rel=0.001)
    for slot, one in plan.streamed.items():
        assert one.budget_bytes <= 3.8 * GB * (1 - STREAM_SLACK)
        assert plan.predicted_bytes[slot] == pytest.approx(one.budget_bytes, abs=0.001 * GB)
    assert "stream from main memory for every row" in plan.reason and "slot 0" in plan.reason and "slot 1" in plan.reason


def test_one_slot_alone_pays_for_its_copies() -> None:
    """Memory management keeps a quarter of a 4 GB card free, and a margin: 2.3 GB are for weights. 5.7 GB stream: 570 ms, and 100 to compute."""
    plan = plan_for(slots_of(4))
    (one,) = plan.streamed.values()
    assert plan.is_single and one.streamed_bytes > 5 * GB
    assert plan.predicted_ms == pytest.approx(ROW_MS + 100 * one.streamed_bytes / GB, rel=0.001)
    assert "8.00 GB" in plan.reason and f"{one.streamed_bytes / GB:.2f} GB of the weights stream" in plan.reason
    two_forwards = plan_for(slots_of(4), job=JobShape(images=2, branches=2))
    assert two_forwards.predicted_ms == pytest.approx(4 * ROW_MS + 2 * 100 * one.streamed_bytes / GB, rel=0.001), "two rows a forward"


def test_the_reason_compares_with_streaming_to_one_slot() -> None:
    alone, cut = plan_for(slots_of(3.8)), plan_for(slots_of(3.8, 3.8))
    assert f"{alone.predicted_ms / cut.predicted_ms:.2f}x of streaming to slot 0 alone" in cut.reason


def test_rows_of_a_cut_copy_fetch_once_each() -> None:
    """A stage takes one row at a time, so two rows copy twice. They overlap: one slot fetches while the other computes."""
    one, two = plan_for(slots_of(3.8, 3.8)), plan_for(slots_of(3.8, 3.8), job=JobShape(images=2, branches=1))
    busy_ms = 2 * max(ROW_MS / 2 + 100 * part.streamed_bytes / GB for part in two.streamed.values())
    assert two.is_one_cut and two.predicted_ms == pytest.approx(busy_ms, rel=0.05)
    assert two.predicted_ms < 2 * one.predicted_ms


def test_fetching_ahead_hides_copies_behind_computation() -> None:
    """Each slot computes for 50 ms and copies less than 0.5 GB meanwhile; a second layer in flight takes room."""
    plain, ahead = plan_for(slots_of(3.8, 3.8)), plan_for(slots_of(3.8, 3.8, fetches_ahead=True))
    assert streamed_gb(ahead) == pytest.approx(streamed_gb(plain) + 2 * LAYER / GB, abs=0.001)
    assert ahead.predicted_ms < plain.predicted_ms and ahead.predicted_ms == pytest.approx(ROW_MS, rel=0.4)


def test_what_fits_does_not_stream() -> None:
    assert not plan_for(slots_of(4.5, 4.5)).streamed and plan_for(slots_of(4.5, 4.5)).is_one_cut
    assert not plan_for(slots_of(9, 3)).streamed


@pytest.mark.parametrize(
    ("slow", "expected"),
    [(0.5, (0, 1, 2)), (0.02, (0, 1))],
)
def test_a_third_slot_helps_only_if_it_is_faster_than_copying(slow: float, expected: tuple[int, ...]) -> None:
    """Two fast slots of 3.8 GB, and one with room for the rest: a GB there takes 1/8 of a row's work at its speed, or 100 ms by copying."""
    plan = plan_for(slots_of(3.8, 3.8, 4, speeds=(1.0, 1.0, slow)))
    assert tuple(sorted(plan.used_slots)) == expected
    assert bool(plan.streamed) is (2 not in expected)


def test_a_slot_that_is_slow_to_reach_is_left_out() -> None:
    """Moving the state takes seconds, more than copying all weights to one slot."""
    plan = make_plan(NETWORK, slots_of(3.8, 3.8), [replace(link, latency_ms=5000.0) for link in fast_links(2)], ONE_ROW)
    assert plan.is_single and plan.streamed


@pytest.mark.parametrize("which", [(0.0, 0.0), (HOST, 0.0)])
def test_a_slot_that_cannot_stream_holds_all_of_its_stage(which: tuple[float, float]) -> None:
    slots = [replace(slot, host_bytes_per_ms=host) for slot, host in zip(slots_of(3.8, 3.8), which)]
    plan = plan_for(slots)
    if not any(which):
        assert plan.is_single
        return
    assert plan.is_one_cut and plan.streamed[1].streamed_bytes == 0 and plan.streamed[0].streamed_bytes > GB
    assert len(plan.replicas[0].pieces_on(1)) > 0 and plan.streamed[1].budget_bytes == 3 * GB


def test_layers_are_cut_and_streamed_when_asked_for() -> None:
    plan = plan_for(slots_of(3.8, 3.8), "layers")
    assert plan.is_one_cut and plan.streamed and "layers was requested" in plan.reason


def test_a_controlnet_takes_room_from_the_layers_of_its_slot() -> None:
    control = ComponentCost(name="ControlNet", weight_bytes=GB, flops_per_row=1.0, runs_per_row=True)
    bare, controlled = plan_for(slots_of(3.8, 3.8)), plan_for(slots_of(3.8, 3.8), job=replace(ONE_ROW, components=(control,)))
    assert controlled.is_one_cut and streamed_gb(controlled) == pytest.approx(streamed_gb(bare) + 1, abs=0.05)
    assert controlled.control_slots["ControlNet"][0] in controlled.used_slots


def test_text_encoders_take_turns_with_a_network_that_fills_the_slots() -> None:
    plan = plan_for(slots_of(3.8, 3.8), job=replace(ONE_ROW, components=(ComponentCost(name="text encoders", weight_bytes=5 * GB),)))
    assert plan.is_one_cut and plan.component_slots == {}


def test_the_fastest_streaming_cut_is_found() -> None:
    """Every straight and nested cut over two unlike slots, priced by a formula of this file."""
    slots = slots_of(2.5, 4.4, speeds=(1.0, 0.6))
    found = partition(NETWORK, slots, fast_links(2), PartitionJob(step_rows=StepRows(images=1, branches=1), least_slots=2, may_stream=True))
    assert found is not None

    def time_of(pieces: int, slot: SlotFacts) -> float:
        held = pieces * GB + 1000 * 4
        room = slot.budget_bytes * (1 - STREAM_SLACK) - LAYER
        streamed = 0.0 if held <= slot.budget_bytes else held - room
        return pieces / BLOCKS * ROW_MS * (1.0 if slot.index == 0 else 1 / 0.6) + streamed / HOST

    least_ms = min(time_of(pieces, slots[0]) + time_of(BLOCKS - pieces, slots[1]) for pieces in range(1, BLOCKS))
    assert found.step_ms == pytest.approx(least_ms, rel=0.011)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(5, 45), min_size=1, max_size=3),
    images=st.integers(1, 2),
    branches=st.integers(1, 2),
    hosts=st.lists(st.sampled_from([0.0, HOST, 10 * HOST]), min_size=3, max_size=3),
)
def test_every_streaming_plan_is_sound(sizes: list[int], images: int, branches: int, hosts: list[float]) -> None:
    """All pieces once; each slot's weights are what its budget holds plus what streams; budgets are kept."""
    slots = [replace(slot, host_bytes_per_ms=host) for slot, host in zip(slots_of(*(size / 10 for size in sizes)), hosts)]
    plan = plan_for(slots, job=JobShape(images=images, branches=branches))
    assert [piece.segment for piece in plan.replicas[0].pieces] == list(range(BLOCKS))
    assert plan.predicted_ms > 0
    if not plan.is_one_cut:
        return
    for slot in plan.streamed:
        weights = GB * len(plan.replicas[0].pieces_on(slot))
        one = plan.streamed[slot]
        in_flight = LAYER if one.streamed_bytes else 0
        assert one.budget_bytes + one.streamed_bytes == pytest.approx(weights + in_flight, abs=2)
        assert one.streamed_bytes == 0 or slots[slot].may_stream


def test_a_plan_that_streams_names_every_slot() -> None:
    replica = ReplicaPlan(pieces=(Piece(0), Piece(1)), slots=(0, 1))
    streams = StreamedWeights(budget_bytes=5, streamed_bytes=1)
    assert Plan(strategy="layers", replicas=(replica,), reason="", streamed={0: streams, 1: streams}).streamed[1].streamed_bytes == 1
    with pytest.raises(ValueError, match="name every slot"):
        Plan(strategy="layers", replicas=(replica,), reason="", streamed={0: streams})
    with pytest.raises(ValueError, match="negative"):
        Plan(strategy="layers", replicas=(replica,), reason="", streamed={0: streams, 1: replace(streams, streamed_bytes=-1)})
