from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.parallel.planning.candidate import LEAST_GAIN, JobShape, deal_by_speed
from backend.parallel.planning.costs import ComponentCost, ModelProfile, contains
from backend.parallel.planning.plan import Plan
from backend.parallel.planning.planner import SlotFacts, make_plan
from tests.support.parallel_costs import GB, ROW_MS, fast_links, make_profile, make_slot

NETWORK = make_profile([1.0] * 12, [GB // 2] * 4 + [GB] * 4 + [GB // 2] * 4)
"""8 GB, light outside."""


CONTROLLED = replace(
    NETWORK, pieces=tuple(replace(cost, control_bytes_per_row=1000 if place >= 5 else 0) for place, cost in enumerate(NETWORK.pieces))
)
"""The same, with residuals from the sixth of its twelve pieces on."""


def slots_of(*sizes_gb: float, speeds: tuple[float, ...] = (), **facts: object) -> list[SlotFacts]:
    speeds = speeds or (1.0,) * len(sizes_gb)
    return [
        make_slot(NETWORK, index, speed=speed, budget_bytes=int(size * GB), total_bytes=int(size * GB), **facts)
        for index, (size, speed) in enumerate(zip(sizes_gb, speeds))
    ]


def plan_for(slots: list[SlotFacts], strategy: str = "auto", **job: object) -> Plan:
    plan = make_plan(NETWORK, slots, fast_links(len(slots)), JobShape(**job), strategy=strategy)  # type: ignore[arg-type]
    assert_is_sound(NETWORK, slots, plan)
    return plan


def assert_is_sound(profile: ModelProfile, slots: list[SlotFacts], plan: Plan) -> None:
    """Every copy complete and in order, no slot in two copies, budgets kept unless weights stream, a reason that names the slots."""
    for replica in plan.replicas:
        owners = [[place for place, piece in enumerate(replica.pieces) if contains(piece, cost.piece)] for cost in profile.pieces]
        assert [len(owner) for owner in owners] == [1] * len(owners)
        assert owners == sorted(owners)
    used = [slot for replica in plan.replicas for slot in replica.used_slots]
    assert len(used) == len(set(used))
    if "stream" not in plan.reason:
        for slot in slots:
            if slot.index in used:
                assert plan.predicted_bytes[slot.index] <= slot.budget_bytes
    assert all(str(slot) in plan.reason for slot in plan.used_slots)
    assert plan.predicted_ms > 0


# balance


def test_the_reason_says_if_no_cut_keeps_equal_slots_within_a_tenth() -> None:
    """One piece has 10 GB of 13: with any cut the slots differ by at least 70 %."""
    lumpy = make_profile([1.0] * 4, [10 * GB, GB, GB, GB])
    slots = [make_slot(lumpy, index) for index in range(2)]
    plan = make_plan(lumpy, slots, fast_links(2), JobShape(images=2), strategy="layers")
    low, high = sorted(plan.predicted_bytes.values())
    assert 1 - low / high >= 0.69
    assert f"({1 - low / high:.0%} apart: of the cuts that fit, none keeps equal slots within 10% of each other)" in plan.reason
    assert "apart" not in plan_for(slots_of(24, 24), "layers", images=2).reason


def test_balance_takes_precedence_over_the_share_of_the_weights() -> None:
    """The primary has 6 GB of other data, so 1 GB of the network goes there and 7 GB, 88 % of its weights, to the other slot."""
    slots = [replace(slot, fixed_bytes=6 * GB if slot.index == 0 else 0) for slot in slots_of(24, 24)]
    plan = plan_for(slots, "layers", images=2)
    low, high = sorted(plan.predicted_bytes.values())
    assert low >= 0.9 * high and "apart" not in plan.reason


# assigning rows


@pytest.mark.parametrize(
    ("num_rows", "speeds", "expected"),
    [
        (2, (1.0, 1.0), (1, 1)),
        (3, (1.0, 1.0), (2, 1)),
        (8, (1.0, 0.6), (5, 3)),
        (2, (1.0, 0.6), (1, 1)),
        (2, (1.0, 0.4), (2, 0)),
        (2, (0.4, 1.0), (0, 2)),
        (1, (1.0, 1.0, 1.0), (1, 0, 0)),
        (0, (1.0, 2.0), (0, 0)),
        (7, (3.0,), (7,)),
    ],
)
def test_rows_are_dealt_by_speed(num_rows: int, speeds: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert deal_by_speed(num_rows, speeds) == expected


@settings(max_examples=100, deadline=None)
@given(num_rows=st.integers(0, 6), speeds=st.lists(st.floats(0.1, 4.0), min_size=1, max_size=3))
def test_no_other_way_to_deal_is_done_earlier(num_rows: int, speeds: list[float]) -> None:
    dealt = deal_by_speed(num_rows, speeds)
    others = [way for way in product(range(num_rows + 1), repeat=len(speeds)) if sum(way) == num_rows]
    assert dealt in others
    best = min(max(rows / speed for rows, speed in zip(way, speeds)) for way in others)
    assert max(rows / speed for rows, speed in zip(dealt, speeds)) <= best * (1 + 1e-9)


@pytest.mark.parametrize("speeds", [(), (1.0, 0.0), (-1.0,)])
def test_assigning_rows_to_no_slot_is_refused(speeds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="Give at least one speed"):
        deal_by_speed(2, speeds)


# which plan


def test_two_cards_and_cfg_take_a_branch_each() -> None:
    plan = plan_for(slots_of(24, 24))
    assert plan.strategy == "replicas"
    assert plan.predicted_speedup == pytest.approx(2.0, rel=0.01)
    assert plan.reason == "2 replicas on slots 0 and 1, cond and uncond side by side: 2.00x predicted of slot 0 alone"
    assert plan.lanes == 1
    assert plan.crossing_bytes == 120  # latents and context to slot 1, its result back


def test_one_row_stays_on_one_slot() -> None:
    plan = plan_for(slots_of(24, 24), branches=1)
    assert plan.strategy == "single"
    assert "one row" in plan.reason


def test_one_slot() -> None:
    plan = plan_for(slots_of(24))
    assert (plan.strategy, plan.used_slots) == ("single", (0,))
    assert "only slot" in plan.reason


@pytest.mark.parametrize(("other_speed", "stays"), [(1.04, True), (1.2, False)])
@pytest.mark.parametrize("strategy", ["auto", "single"])
def test_the_network_stays_at_home_unless_another_slot_is_worth_the_move(other_speed: float, stays: bool, strategy: str) -> None:
    home, other = slots_of(100, 100, speeds=(1.0, other_speed))
    plan = plan_for([replace(home, is_home=True), other], strategy, branches=1)
    assert plan.strategy == "single"
    assert plan.used_slots == ((0,) if stays else (1,))


def test_the_fastest_slot_that_fits_the_network_is_the_single_one() -> None:
    plan = plan_for(slots_of(24, 24, 4, speeds=(0.5, 1.0, 5.0)), "single")
    assert plan.used_slots == (1,)
    assert plan.single_ms == pytest.approx(2 * ROW_MS, rel=0.01)


@pytest.mark.parametrize(("images", "speeds", "speedup"), [(1, (1.0, 0.6), 1.2), (4, (1.0, 0.6), 1.6), (2, (1.0, 0.6), 1.33)])
def test_unequal_cards_reach_what_whole_rows_allow(images: int, speeds: tuple[float, ...], speedup: float) -> None:
    plan = plan_for(slots_of(24, 24, speeds=speeds), "replicas", images=images)
    assert plan.predicted_speedup == pytest.approx(speedup, rel=0.01)


def test_more_slots_than_rows_use_no_more_than_help() -> None:
    plan = plan_for(slots_of(24, 24, 24, 24))
    assert plan.used_slots == (0, 1)


def test_three_slots_for_four_rows_are_no_better_than_two() -> None:
    assert plan_for(slots_of(24, 24, 24), "replicas", images=2).used_slots == (0, 1)
    assert plan_for(slots_of(24, 24, 24), "replicas", images=3).used_slots == (0, 1, 2)


def test_what_fits_no_single_slot_is_cut() -> None:
    plan = plan_for(slots_of(6, 6), images=2)
    assert plan.strategy == "layers"
    assert plan.lanes == 2
    assert plan.single_ms == math.inf
    assert "fits no single slot" in plan.reason


def test_without_lanes_a_cut_has_one() -> None:
    assert plan_for(slots_of(6, 6), images=2, may_use_lanes=False).lanes == 1


def test_four_small_slots_make_two_copies_for_one_image() -> None:
    plan = plan_for(slots_of(6, 6, 6, 6))
    assert plan.strategy == "hybrid"
    assert len(plan.replicas) == 2
    assert plan.predicted_ms == pytest.approx(ROW_MS, rel=0.01)


def test_a_big_and_two_small_slots_work_together() -> None:
    plan = plan_for(slots_of(24, 5, 5), images=4)
    assert set(plan.used_slots) == {0, 1, 2}
    assert plan.predicted_speedup > 2.0


def test_what_fits_nowhere_streams_and_says_the_numbers() -> None:
    plan = plan_for(slots_of(1, 2))
    assert (plan.strategy, plan.used_slots) == ("single", (1,))
    assert "8.00 GB" in plan.reason and "2.00 GB" in plan.reason and "stream" in plan.reason
    assert plan.predicted_speedup == 1.0


def test_gains_below_the_least_are_not_taken() -> None:
    slow = plan_for(slots_of(24, 24, speeds=(1.0, 0.05)), images=1)
    assert slow.strategy == "single"
    assert f"below {LEAST_GAIN}x" in slow.reason or "no plan over several slots" in slow.reason


def test_slow_links_speak_against_cuts() -> None:
    plan = make_plan(NETWORK, slots_of(24, 24, speeds=(1.0, 0.5)), (), JobShape(images=1))
    assert plan.strategy in ("single", "layers")
    assert plan.strategy == "single" or plan.predicted_speedup >= LEAST_GAIN


def test_measured_speed_changes_the_plan() -> None:
    """A card that turns out to be slow gets less work, and finally none."""
    shares = []
    for speed in (1.0, 0.7, 0.3, 0.1):
        plan = plan_for(slots_of(24, 24, speeds=(1.0, speed)), images=4)
        shares.append(plan.predicted_speedup)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(2.0, rel=0.01)


# forced strategies


def test_forced_strategies_are_honoured() -> None:
    slots = slots_of(24, 24)
    assert plan_for(slots, "single").strategy == "single"
    assert plan_for(slots, "replicas").strategy == "replicas"
    layers = plan_for(slots, "layers")
    assert layers.strategy == "layers"
    assert set(layers.used_slots) == {0, 1}
    assert "layers was requested" in layers.reason


@pytest.mark.parametrize(
    ("sizes", "strategy", "branches", "used", "words"),
    [
        ((24,), "layers", 2, "single", "layers was requested but there is one slot"),
        ((24,), "replicas", 2, "single", "replicas was requested but there is one slot"),
        ((24, 24), "replicas", 1, "single", "replicas was requested but there is one row a step"),
        ((6, 6), "replicas", 2, "layers", "replicas was requested but does not fit"),
        ((6, 6), "single", 2, "layers", "single was requested but does not fit"),
        ((2,), "single", 2, "single", "single was requested but does not fit"),
        ((2, 2), "layers", 2, "single", "layers was requested but does not fit"),
    ],
)
def test_what_cannot_be_forced_says_why(sizes: tuple[float, ...], strategy: str, branches: int, used: str, words: str) -> None:
    plan = plan_for(slots_of(*sizes), strategy, branches=branches)
    assert plan.strategy == used
    assert words in plan.reason


def test_replicas_whose_rows_all_go_to_one_slot_say_so() -> None:
    plan = plan_for(slots_of(24, 24, speeds=(1.0, 5.0)), "replicas", branches=2)
    assert plan.strategy == "single"
    assert "replicas was requested but slot 1 is so much faster than the others that it gets all 2 rows" in plan.reason


def test_no_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="over no slots"):
        make_plan(NETWORK, [], (), JobShape())


# bytes and components


def test_slots_of_one_device_share_weights() -> None:
    slots = slots_of(10, 10, device_key="card")
    plan = plan_for(slots)
    assert plan.strategy == "replicas"
    assert plan.crossing_bytes == 0
    assert sum(plan.predicted_bytes.values()) < 9 * GB


def test_slots_of_one_device_share_the_budget() -> None:
    """Both slots report the same fixed bytes, which exist once; the weights fit once, and nothing else fits."""
    slots = slots_of(8.5, 8.5, device_key="card", fixed_bytes=GB)
    assert "stream" in plan_for(slots).reason


def test_components_go_to_slots_with_room() -> None:
    text = ComponentCost(name="text", weight_bytes=2 * GB)
    plan = plan_for(slots_of(24, 10), "single", components=(text,))
    assert plan.component_slots == {"text": 0}
    plan = plan_for(slots_of(10, 10), "single", components=(text,))
    assert plan.component_slots == {"text": 1}


def test_every_full_copy_has_its_controlnet() -> None:
    control = ComponentCost(name="ControlNet", weight_bytes=3 * GB, flops_per_row=6.0, runs_per_row=True)
    with_control = plan_for(slots_of(24, 24), components=(control,))
    assert with_control.predicted_ms == pytest.approx(1.5 * ROW_MS, rel=0.01)
    assert all(num_bytes > 11 * GB for num_bytes in with_control.predicted_bytes.values())
    assert with_control.control_slots == {"ControlNet": (0, 1)}
    assert plan_for(slots_of(7, 7), components=(control,)).strategy == "layers"


def test_a_controlnet_overlaps_the_input_blocks_of_the_only_row() -> None:
    """Five twelfths of the network come before the first residual. A ControlNet that takes as long as they do hides behind them."""
    network, slots = CONTROLLED, slots_of(24, 24)
    control = ComponentCost(name="ControlNet", weight_bytes=3 * GB, flops_per_row=5.0, runs_per_row=True)
    job = JobShape(branches=1, components=(control,))
    plan = make_plan(network, slots, fast_links(2), job)
    assert (plan.strategy, plan.used_slots, plan.control_slots) == ("single", (0,), {"ControlNet": (1,)})
    assert plan.has_control_elsewhere
    assert plan.predicted_ms == pytest.approx(ROW_MS, rel=0.01)
    assert plan.predicted_speedup == pytest.approx(17 / 12, rel=0.01)
    assert "ControlNet on slot 1" in plan.reason
    assert plan.predicted_bytes[1] > 3 * GB
    alone = make_plan(network, slots, fast_links(2), job, strategy="single")
    assert alone.control_slots == {"ControlNet": alone.used_slots}
    longer = replace(control, flops_per_row=11.0)
    assert make_plan(network, slots, fast_links(2), replace(job, components=(longer,))).predicted_ms == pytest.approx(1.5 * ROW_MS, rel=0.01)


def test_controlnets_have_a_slot_each_where_copies_of_both_fit_nowhere() -> None:
    """Two ControlNets of 3 GB with two copies of 8 GB on cards of 12 GB: both slots do the same work."""
    controls = tuple(ComponentCost(name=name, weight_bytes=3 * GB, flops_per_row=6.0, runs_per_row=True) for name in ("a", "b"))
    roomy, tight = plan_for(slots_of(24, 24), components=controls), plan_for(slots_of(12, 12), components=controls)
    assert roomy.control_slots == {"a": (0, 1), "b": (0, 1)}
    assert tight.strategy == "replicas"
    assert sorted(tight.control_slots.values()) == [(0, 0), (1, 1)]
    assert tight.predicted_ms == pytest.approx(2.0 * ROW_MS, rel=0.01)


def test_a_slot_with_a_controlnet_for_all_gets_fewer_rows() -> None:
    """Eight rows, and a ControlNet of half their work that fits on the second slot only: six rows for the first slot, whose residuals are
    there after 300 ms, when 250 of its 600 are done."""
    control = ComponentCost(name="ControlNet", weight_bytes=6 * GB, flops_per_row=6.0, runs_per_row=True)
    plan = make_plan(CONTROLLED, slots_of(9, 24), fast_links(2), JobShape(images=4, components=(control,)), strategy="replicas")
    assert plan.control_slots == {"ControlNet": (1, 1)}
    assert plan.predicted_ms == pytest.approx(650, rel=0.01)
    assert deal_by_speed(8, (1.0, 1.0), (0.0, 4.0)) == (6, 2)


def test_a_cut_with_a_controlnet_says_where_it_is() -> None:
    control = ComponentCost(name="ControlNet", weight_bytes=GB, flops_per_row=3.0, runs_per_row=True)
    plan = plan_for(slots_of(24, 24), "layers", components=(control,))
    assert plan.component_slots["ControlNet"] in (0, 1)
    assert plan.predicted_ms > plan_for(slots_of(24, 24), "layers").predicted_ms


def test_launches_of_all_slots_add_up_in_one_interpreter() -> None:
    """Twelve operations per forward at 20 ms each: two slots launch them one after the other, one slot launches them once for both rows."""
    assert plan_for(slots_of(24, 24, kernel_ms=20.0)).strategy == "single"
    assert plan_for(slots_of(24, 24, kernel_ms=1.0)).strategy == "replicas"


def test_reading_weights_costs_single_rows_more() -> None:
    plan = plan_for(slots_of(24, 24, memory_bytes_per_ms=8 * GB / 20.0))
    assert plan.predicted_speedup == pytest.approx((20 + 200) / (20 + 100), rel=0.01)


def test_planning_again_gives_the_same_plan() -> None:
    assert plan_for(slots_of(24, 12, 6), images=3) == plan_for(slots_of(24, 12, 6), images=3)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    speeds=st.lists(st.sampled_from([0.3, 1.0, 1.5]), min_size=3, max_size=3),
    images=st.integers(1, 3),
    branches=st.integers(1, 2),
    strategy=st.sampled_from(["auto", "single", "replicas", "layers", "hybrid"]),
)
def test_every_plan_is_sound(sizes: list[int], speeds: list[float], images: int, branches: int, strategy: str) -> None:
    slots = slots_of(*sizes, speeds=tuple(speeds[: len(sizes)]))
    plan = plan_for(slots, strategy, images=images, branches=branches)
    if strategy == "auto" and len(plan.used_slots) > 1 and plan.single_ms < math.inf:
        assert plan.predicted_speedup >= LEAST_GAIN * (1 - 1e-9)
    if strategy == "auto" and plan.single_ms < math.inf:
        assert plan.predicted_ms <= plan.single_ms * (1 + 1e-9)
