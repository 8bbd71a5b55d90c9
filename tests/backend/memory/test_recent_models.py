"""Which models stay in main memory, by example and by property."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backend.memory.recent_models import RecentModels, recent_models_budget_bytes

GIB = 2**30
ROOMY = {"budget_bytes": 100, "max_models": 10}


def test_going_back_finds_the_model_itself() -> None:
    recent: RecentModels[object] = RecentModels()
    a, b = object(), object()
    recent.put("a", a, 10, **ROOMY)
    recent.put("b", b, 10, **ROOMY)
    assert recent.take("a") is a
    assert recent.take("a") is None
    assert (len(recent), recent.held_bytes) == (1, 10)


def test_the_least_recently_used_goes_first() -> None:
    recent: RecentModels[str] = RecentModels()
    for key in "abc":
        recent.put(key, key, 30, **ROOMY)
    recent.put("a", recent.take("a") or "", 30, **ROOMY)
    assert recent.put("d", "d", 30, **ROOMY) == ("b",)
    assert recent.put("e", "e", 90, **ROOMY) == ("c", "a", "d")
    assert recent.shrink(budget_bytes=100, max_models=0) == ("e",)


def test_what_does_not_fit_alone_does_not_wait() -> None:
    recent: RecentModels[str] = RecentModels()
    assert recent.put("large", "large", 101, **ROOMY) == ("large",)
    assert len(recent) == 0


def test_the_budget_is_a_share_of_all_and_of_what_is_free() -> None:
    assert recent_models_budget_bytes(32 * GIB, 30 * GIB) == int(0.4 * 32 * GIB)
    assert recent_models_budget_bytes(32 * GIB, 8 * GIB) == 4 * GIB
    assert recent_models_budget_bytes(32 * GIB, 0) == 0


@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60), st.booleans()), max_size=40),
    budget_bytes=st.integers(0, 120),
    max_models=st.integers(0, 4),
)
def test_limits_are_kept_after_every_step(steps: list[tuple[int, int, bool]], budget_bytes: int, max_models: int) -> None:
    recent: RecentModels[int] = RecentModels()
    for key, size, takes in steps:
        if takes:
            recent.take(key)
        else:
            recent.put(key, key, size, budget_bytes=budget_bytes, max_models=max_models)
        assert recent.held_bytes <= budget_bytes and len(recent) <= max_models
