"""When the planner cuts rows into tiles, over which slots, and what it says. Costs are those of full-size SDXL, counted on the meta device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backend.parallel.planning.candidate import JobShape
from backend.parallel.planning.costs import ComponentCost, ModelProfile
from backend.parallel.planning.plan import Plan, ReplicaPlan, TileTeam
from backend.parallel.planning.planner import Link, SlotFacts, WantedStrategy, make_plan
from backend.parallel.planning.simulation import component_costs, profile_model

GB = 10**9


@pytest.fixture(scope="module")
def sdxl() -> ModelProfile:
    return profile_model("sdxl", 1024, 1024)


def make_slots(*speeds: float, budget_bytes: int = 20 * GB) -> list[SlotFacts]:
    """Speed 1 is 50 TFLOPS."""
    return [
        SlotFacts(index=index, kind="cuda", speed=5e10 * speed, budget_bytes=budget_bytes, total_bytes=budget_bytes, is_home=index == 0)
        for index, speed in enumerate(speeds)
    ]


def make_links(count: int, gb_per_s: float = 50.0, latency_ms: float = 0.01) -> list[Link]:
    pairs = [(source, target) for source in range(count) for target in range(count) if source != target]
    return [Link(source=source, target=target, bytes_per_ms=gb_per_s * 1e6, latency_ms=latency_ms) for source, target in pairs]


def plan_for(
    profile: ModelProfile, *speeds: float, branches: int = 1, images: int = 1, strategy: WantedStrategy = "auto", gb_per_s: float = 50.0,
    why_no_tiles: str | None = None, budget_bytes: int = 20 * GB,
) -> Plan:  # fmt: skip
    job = JobShape(images=images, branches=branches, may_use_lanes=False, why_no_tiles=why_no_tiles)
    return make_plan(profile, make_slots(*speeds, budget_bytes=budget_bytes), make_links(len(speeds), gb_per_s), job, strategy=strategy)


def test_one_row_on_two_slots_is_cut(sdxl: ModelProfile) -> None:
    plan = plan_for(sdxl, 1.0, 1.0)
    assert plan.strategy == "tiles"
    assert plan.tiles == (TileTeam(slots=(0, 1), rows=(64, 64)),)
    assert 1.5 < plan.predicted_speedup < 2.0
    assert plan.reason.startswith("each row in tiles on slots 0 and 1 (64:64): 1.")


def test_unequal_slots_get_unequal_tiles(sdxl: ModelProfile) -> None:
    plan = plan_for(sdxl, 1.0, 0.6)
    assert plan.tiles == (TileTeam(slots=(0, 1), rows=(80, 48)),)
    assert plan.predicted_speedup > 1.35


def test_branches_go_to_replicas_first_and_then_to_teams(sdxl: ModelProfile) -> None:
    assert plan_for(sdxl, 1.0, 1.0, branches=2).strategy == "replicas"
    plan = plan_for(sdxl, 1.0, 1.0, 1.0, 1.0, branches=2)
    assert plan.strategy == "tiles"
    assert [len(team.slots) for team in plan.tiles] == [2, 2]
    assert "2 rows" in plan.reason or "cond and uncond side by side" in plan.reason


def test_two_unequal_slots_share_both_branches(sdxl: ModelProfile) -> None:
    """Whole rows could give 1.2x only."""
    plan = plan_for(sdxl, 1.0, 0.6, branches=2)
    assert plan.strategy == "tiles"
    assert plan.predicted_speedup > 1.35


def test_a_slow_link_makes_tiles_slower_than_one_slot(sdxl: ModelProfile) -> None:
    plan = plan_for(sdxl, 1.0, 1.0, gb_per_s=0.5)
    assert plan.strategy == "single"
    assert "below 1.05x" in plan.reason


def test_a_requested_plan_is_used_even_if_it_is_slower(sdxl: ModelProfile) -> None:
    plan = plan_for(sdxl, 1.0, 1.0, gb_per_s=0.5, strategy="tiles")
    assert plan.strategy == "tiles"
    assert plan.reason.endswith("; tiles was requested")
    assert plan_for(sdxl, 1.0, 1.0, branches=2, strategy="tiles").is_tiled


@pytest.mark.parametrize("strategy", ["auto", "tiles"])
def test_what_keeps_rows_whole_is_in_the_reason(sdxl: ModelProfile, strategy: WantedStrategy) -> None:
    plan = plan_for(sdxl, 1.0, 1.0, strategy=strategy, why_no_tiles="FreeU.patch needs whole tensors")
    assert plan.strategy == "single"
    assert "it cannot be cut into tiles: FreeU.patch needs whole tensors" in plan.reason


def test_a_network_without_tiles_and_a_picture_too_small(sdxl: ModelProfile) -> None:
    assert "cannot be cut into tiles" in plan_for(replace(sdxl, tiles=None), 1.0, 1.0).reason
    assert sdxl.tiles is not None
    small = replace(sdxl, tiles=replace(sdxl.tiles, length=7))
    assert "its 7 rows are too few for two tiles of at least 4" in plan_for(small, 1.0, 1.0).reason
    assert plan_for(replace(sdxl, tiles=replace(sdxl.tiles, length=9)), *(1.0,) * 4, strategy="tiles").tiles[0].rows in ((5, 4), (4, 5))


def test_each_slot_needs_room_for_a_copy(sdxl: ModelProfile) -> None:
    assert not plan_for(sdxl, 1.0, 1.0, budget_bytes=4 * GB).is_tiled
    plan = plan_for(sdxl, 1.0, 1.0, 1.0, 1.0)
    single = plan_for(sdxl, 1.0, strategy="single")
    assert max(plan.predicted_bytes.values()) < single.predicted_bytes[0]


def test_many_slots(sdxl: ModelProfile) -> None:
    plan = plan_for(sdxl, *(1.0,) * 8, branches=2, gb_per_s=200.0)
    assert [len(team.slots) for team in plan.tiles] == [4, 4]


def test_counts_of_full_size_sdxl(sdxl: ModelProfile) -> None:
    """The field study counts 70 self-attentions, 46 group norms and 3x3 convolutions fused with the norms before them: about 120 exchanges."""
    assert sdxl.tiles is not None
    assert 115 <= sdxl.tiles.num_exchanges <= 125
    assert sdxl.tiles.unit == 4
    received_mb = sdxl.tiles.arriving_bytes((64, 64), 2)[0] / 1e6
    assert received_mb == pytest.approx(428 / 2, rel=0.1)  # it counts 428 MB for two rows


# ControlNets


@pytest.fixture(scope="module")
def control() -> ComponentCost:
    """Of full-size SDXL."""
    return component_costs("sdxl", 1024, 1024, has_controlnet=True)[-1]


def plan_with(profile: ModelProfile, control: ComponentCost, *speeds: float, budget_bytes: int = 20 * GB, branches: int = 1) -> Plan:
    job = JobShape(branches=branches, components=(control,))
    return make_plan(profile, make_slots(*speeds, budget_bytes=budget_bytes), make_links(len(speeds)), job, strategy="tiles")


def test_a_controlnet_is_computed_in_the_tiles_of_the_row(sdxl: ModelProfile, control: ComponentCost) -> None:
    """A whole pass on one of two slots would cost its time once more: about a third of the network's."""
    assert control.tiles is not None and 40 <= control.tiles.num_exchanges <= 70
    plan, whole = (plan_with(sdxl, one, 1.0, 1.0) for one in (control, replace(control, tiles=None)))
    assert plan.control_slots == {"ControlNet": (0, 1)}
    assert len(set(whole.control_slots["ControlNet"])) == 1
    assert plan.predicted_ms < 0.9 * whole.predicted_ms
    assert plan.predicted_speedup > 1.6


def test_a_controlnet_that_cannot_be_cut_goes_to_a_slot_outside_the_team_if_that_is_faster(sdxl: ModelProfile, control: ComponentCost) -> None:
    plan = plan_with(sdxl, replace(control, tiles=None), 1.0, 1.0, 0.9)
    (slot,) = set(plan.control_slots["ControlNet"])
    assert slot not in plan.used_slots
    assert f"ControlNet on slot {slot}" in plan.reason


def test_slots_without_room_for_the_controlnet_leave_it_to_one(sdxl: ModelProfile, control: ComponentCost) -> None:
    alone = plan_with(sdxl, control, 1.0, 1.0)
    slots = make_slots(1.0, 1.0)
    slots[1] = replace(slots[1], budget_bytes=alone.predicted_bytes[1] - control.weight_bytes // 2)
    plan = make_plan(sdxl, slots, make_links(2), JobShape(branches=1, components=(control,)), strategy="tiles")
    assert plan.is_tiled and plan.control_slots == {"ControlNet": (0, 0)}


def make_tile_plan(*tiles: TileTeam, copies: int | None = None, **fields: object) -> Plan:
    from backend.nn.piece import Piece

    slots = [slot for team in tiles for slot in team.slots][:copies]
    replicas = tuple(ReplicaPlan(pieces=(Piece(0),), slots=(slot,)) for slot in slots)
    return Plan(**{"strategy": "tiles", "replicas": replicas, "reason": "", "tiles": tiles, **fields})  # type: ignore[arg-type]


def test_a_plan_that_contradicts_itself() -> None:
    pair = TileTeam(slots=(0, 1), rows=(3, 1))
    assert make_tile_plan(pair, TileTeam(slots=(2,), rows=(4,))).used_slots == (0, 1, 2)
    assert pair.shares == (0.75, 0.25)
    with pytest.raises(ValueError, match="is in a team once"):
        TileTeam(slots=(0, 1), rows=(4, 0))
    with pytest.raises(ValueError, match="different lengths"):
        make_tile_plan(pair, TileTeam(slots=(2, 3), rows=(4, 4)))
    with pytest.raises(ValueError, match="copies on"):
        make_tile_plan(pair, TileTeam(slots=(2, 3), rows=(2, 2)), copies=3)
    with pytest.raises(ValueError, match="0 teams"):
        make_tile_plan(pair, TileTeam(slots=(2, 3), rows=(2, 2)), tiles=())
