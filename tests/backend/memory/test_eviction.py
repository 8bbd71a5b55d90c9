"""Which models are evicted, by example and by property."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backend.memory.eviction import Resident, plan_eviction


def victims(residents: list[Resident], **asked: int | bool) -> list[int]:
    return [victim.key for victim in plan_eviction(residents, **asked)]


NEWEST_FIRST = [
    Resident(key=0, frees_bytes=10),
    Resident(key=1, frees_bytes=20, pinned=True),
    Resident(key=2, frees_bytes=30),
    Resident(key=3, frees_bytes=5),
]


def test_least_recently_used_leave_first_and_only_as_many_as_needed() -> None:
    assert victims(NEWEST_FIRST, need_bytes=4, free_bytes=0) == [3]
    assert victims(NEWEST_FIRST, need_bytes=5, free_bytes=0) == [3, 2]
    assert victims(NEWEST_FIRST, need_bytes=36, free_bytes=0) == [3, 2, 0]


def test_with_enough_free_memory_nothing_is_evicted() -> None:
    assert victims(NEWEST_FIRST, need_bytes=4, free_bytes=5) == []


def test_models_in_use_stay_even_when_memory_is_short() -> None:
    assert victims(NEWEST_FIRST, need_bytes=1000, free_bytes=0) == [3, 2, 0]
    assert victims(NEWEST_FIRST, need_bytes=0, free_bytes=0, evict_all=True) == [3, 2, 0]


def test_who_would_free_nothing_stays() -> None:
    assert victims([Resident(key=0, frees_bytes=0)], need_bytes=10, free_bytes=0) == []


residents = st.lists(st.tuples(st.integers(0, 100), st.booleans()), max_size=8).map(
    lambda found: [Resident(key=key, frees_bytes=frees, pinned=pinned) for key, (frees, pinned) in enumerate(found)]
)


@given(residents=residents, need_bytes=st.integers(0, 400), free_bytes=st.integers(0, 200))
def test_enough_leave_or_all_that_may(residents: list[Resident], need_bytes: int, free_bytes: int) -> None:
    leaving = plan_eviction(residents, need_bytes=need_bytes, free_bytes=free_bytes)
    may_leave = [one for one in residents if not one.pinned and one.frees_bytes > 0]
    assert set(leaving) <= set(may_leave)
    after_bytes = free_bytes + sum(one.frees_bytes for one in leaving)
    assert after_bytes > need_bytes or len(leaving) == len(may_leave)
    if leaving:  # without the last one it would not have been enough
        assert after_bytes - leaving[-1].frees_bytes <= need_bytes
