"""Placement by free memory, with made-up fleets."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from backend.memory.placement import ModelNeed, Placement, SlotRoom, plan_placements, select_slot

GIB = 2**30


def room(index: int, total_gib: float, free_gib: float, **others: int) -> SlotRoom:
    return SlotRoom(index=index, total_bytes=int(total_gib * GIB), free_bytes=int(free_gib * GIB), **others)


def need(weights_gib: float, working_gib: float = 0.0, name: str = "model") -> ModelNeed:
    return ModelNeed(name=name, weights_bytes=int(weights_gib * GIB), working_bytes=int(working_gib * GIB))


def test_most_room_left_relative_to_the_card_wins() -> None:
    # 24 GB card: 10 of 24 left (42 %); 12 GB card: 6 of 12 left (50 %)
    assert select_slot(need(5, 1), [room(0, 24, 16), room(1, 12, 12)]).slot_index == 1


def test_ties_go_to_the_lower_index() -> None:
    assert select_slot(need(1), [room(2, 8, 8), room(1, 8, 8)]).slot_index == 1


def test_home_is_preferred_to_free_memory() -> None:
    rooms = [room(0, 24, 24), room(1, 8, 1, present_bytes=5 * GIB)]
    assert select_slot(need(5, 0.5), rooms).slot_index == 1


def test_home_without_room_to_work_is_left() -> None:
    rooms = [room(0, 24, 24), room(1, 8, 1, present_bytes=5 * GIB)]
    assert select_slot(need(5, 2), rooms).slot_index == 0


def test_a_slot_without_evictions_is_preferred() -> None:
    rooms = [room(0, 24, 1, evictable_bytes=20 * GIB), room(1, 8, 6)]
    assert select_slot(need(5), rooms).slot_index == 1
    assert select_slot(need(10), rooms).slot_index == 0


def test_the_reserve_is_nobodys() -> None:
    assert select_slot(need(5), [room(0, 8, 6, reserve_bytes=2 * GIB)]).slot_index is None


def test_a_shortage_is_reported_with_the_numbers() -> None:
    placement = select_slot(need(5, 1, "UNet"), [room(0, 4, 4), room(1, 4, 3)])
    assert placement.slot_index is None
    assert placement.reason == (
        "UNet fits on no slot whole: it needs 5120 MiB for weights and 1024 MiB to run; room in MiB: slot 0 4096, slot 1 3072; together 7168"
    )


def test_a_picture_on_two_cards_does_not_push_the_unet_out() -> None:
    parts = [need(1.5, 0.2, "text encoder"), need(5, 1, "UNet"), need(0.3, 2, "VAE")]
    placements = plan_placements(parts, [room(0, 8, 8), room(1, 6, 6)])
    assert [placement.slot_index for placement in placements] == [1, 0, 1]
    assert all(placement.is_whole for placement in placements)


def test_parts_that_work_in_turn_share_working_memory() -> None:
    placements = plan_placements([need(3, 2, "a"), need(3, 2, "b")], [room(0, 8, 8)])
    assert all(placement.is_whole for placement in placements)


def test_what_fits_nowhere_streams_where_most_of_it_can_stay() -> None:
    (placement,) = plan_placements([need(10, 1)], [room(0, 4, 4), room(1, 6, 6)])
    assert (placement.slot_index, placement.resident_bytes) == (1, 5 * GIB)
    assert not placement.is_whole


def test_what_cannot_even_work_anywhere_gets_no_slot() -> None:
    (placement,) = plan_placements([need(1, 9)], [room(0, 4, 4)])
    assert placement.slot_index is None and "fits on no slot whole" in placement.reason


bytes_up_to_96_gib = st.integers(min_value=0, max_value=96 * GIB)


@st.composite
def fleets(draw: st.DrawFn) -> list[SlotRoom]:
    rooms = []
    for index in range(draw(st.integers(1, 8))):
        total_bytes = draw(st.integers(1, 96 * GIB))
        free_bytes = draw(st.integers(0, total_bytes))
        evictable_bytes = draw(st.integers(0, total_bytes - free_bytes))
        reserve_bytes = draw(st.integers(0, 2 * GIB))
        rooms.append(
            SlotRoom(index=index, total_bytes=total_bytes, free_bytes=free_bytes, evictable_bytes=evictable_bytes, reserve_bytes=reserve_bytes)
        )
    return rooms


models = st.lists(st.builds(ModelNeed, name=st.just("m"), weights_bytes=bytes_up_to_96_gib, working_bytes=st.integers(0, 16 * GIB)), max_size=8)


def peak_bytes(placements: tuple[Placement, ...], index: int) -> int:
    """Counted independently of the planner: all resident weights, and at each moment the layer that runs."""
    here = [placement for placement in placements if placement.slot_index == index]
    weights_bytes = sum(placement.resident_bytes for placement in here)
    return max((weights_bytes + placement.need.working_bytes for placement in here), default=0)


@given(rooms=fleets(), needs=models)
def test_no_plan_exceeds_a_budget(rooms: list[SlotRoom], needs: list[ModelNeed]) -> None:
    placements = plan_placements(needs, rooms)
    for one in rooms:
        assert peak_bytes(placements, one.index) <= max(0, one.free_bytes + one.evictable_bytes - one.reserve_bytes)


@given(rooms=fleets(), needs=models, seed=st.integers(0, 1000))
def test_placement_is_deterministic_and_blind_to_the_order_of_slots(rooms: list[SlotRoom], needs: list[ModelNeed], seed: int) -> None:
    shuffled = list(rooms)
    random.Random(seed).shuffle(shuffled)
    assert [one.slot_index for one in plan_placements(needs, rooms)] == [one.slot_index for one in plan_placements(needs, shuffled)]
    assert plan_placements(needs, rooms) == plan_placements(needs, rooms)


@given(rooms=fleets(), needs=models)
def test_a_model_is_streamed_only_when_no_slot_has_room_for_it(rooms: list[SlotRoom], needs: list[ModelNeed]) -> None:
    for one in needs[:1]:
        fits = any(room.left_bytes(one.total_bytes) >= 0 for room in rooms)
        assert plan_placements([one], rooms)[0].is_whole == fits or (one.weights_bytes == 0 and not fits)
