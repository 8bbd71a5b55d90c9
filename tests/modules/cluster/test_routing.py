from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.cluster.routing import Candidate, Need, Router


def router_of(*workers: Candidate, **times: float) -> Router:
    router = Router(**{"load_s": 10.0, "job_s": 5.0, **times})
    for worker in workers:
        router.add(worker)
    return router


def test_a_worker_that_has_the_checkpoint_is_chosen() -> None:
    router = router_of(Candidate(name="a", checkpoint="x", speed=9), Candidate(name="b", checkpoint="y"), Candidate(name="c"))
    assert router.place(Need(checkpoint="y")) == "b"
    assert router.num_loads == 0


def test_among_those_one_with_the_networks_is_chosen_then_the_fastest() -> None:
    lora = frozenset({"ink"})
    router = router_of(
        Candidate(name="a", checkpoint="x", speed=3),
        Candidate(name="b", checkpoint="x", networks=lora),
        Candidate(name="c", checkpoint="x", networks=lora, speed=2),
    )
    assert [router.place(Need(checkpoint="x", networks=lora)) for _ in range(3)] == ["c", "b", "a"]


def test_an_empty_worker_loads_before_another_checkpoint_is_given_up() -> None:
    router = router_of(Candidate(name="a", checkpoint="x", speed=9), Candidate(name="b"))
    assert router.place(Need(checkpoint="y")) == "b"
    assert router.num_loads == 1


def test_the_checkpoint_with_most_idle_copies_for_its_demand_is_given_up() -> None:
    router = router_of(*[Candidate(name=f"x{i}", checkpoint="x") for i in range(3)], Candidate(name="y0", checkpoint="y"))
    for _ in range(9):
        router.release(router.place(Need(checkpoint="x")) or "")
    assert router.place(Need(checkpoint="z")) == "y0"  # nobody has asked for y


def test_a_job_waits_for_a_busy_worker_if_that_is_shorter_than_a_load() -> None:
    router = router_of(Candidate(name="a", checkpoint="x"), Candidate(name="b", checkpoint="y"))
    assert router.place(Need(checkpoint="x")) == "a"
    assert router.place(Need(checkpoint="x"), waited_s=9.9) is None
    assert router.place(Need(checkpoint="x"), waited_s=10) == "b"


def test_it_does_not_wait_if_a_load_is_shorter() -> None:
    router = router_of(Candidate(name="a", checkpoint="x"), Candidate(name="b"), load_s=2)
    assert [router.place(Need(checkpoint="x")) for _ in range(2)] == ["a", "b"]


@pytest.mark.parametrize(
    "worker",
    [
        Candidate(name="a", checkpoint="x", room=0),
        Candidate(name="a", checkpoint="x", is_open=False),
        Candidate(name="a", checkpoint="x", total_bytes=7),
        Candidate(name="bad", checkpoint="x"),
    ],
)
def test_a_worker_without_room_that_is_closed_too_small_or_excluded_gets_nothing(worker: Candidate) -> None:
    need = Need(checkpoint="x", need_bytes=8, excluded=frozenset({"bad"}))
    assert router_of(worker).place(need, waited_s=1e9) is None


def test_what_a_worker_loaded_is_known_at_once() -> None:
    router = router_of(Candidate(name="a"), Candidate(name="b"))
    first = router.place(Need(checkpoint="x"))
    router.release(first or "")
    assert router.place(Need(checkpoint="x")) == first
    assert router.num_loads == 1


def test_a_worker_that_left_gets_nothing_and_may_end_its_job() -> None:
    router = router_of(Candidate(name="a", checkpoint="x"))
    router.place(Need(checkpoint="x"))
    router.remove("a")
    router.remove("a")
    router.release("a")
    assert "a" not in router
    assert router.place(Need(checkpoint="x"), waited_s=1e9) is None


def test_measured_times_replace_assumed_ones() -> None:
    router = Router(load_s=10, job_s=5)
    router.note_times(job_s=2, load_s=1)
    assert (router.job_s, router.load_s) == (2, 1)
    router.note_times(job_s=12, load_s=-5)
    assert (router.job_s, router.load_s) == (pytest.approx(3), pytest.approx(0.9))


actions = st.lists(st.tuples(st.sampled_from(["place", "release", "add", "remove"]), st.integers(0, 4), st.sampled_from("xyz")), max_size=60)


@settings(max_examples=60, deadline=None)
@given(actions)
def test_no_worker_gets_more_jobs_than_it_has_room_for(steps: list[tuple[str, int, str]]) -> None:
    router, running = Router(), dict[str, int]()
    for kind, number, checkpoint in steps:
        name = f"w{number}"
        if kind == "add" and name not in router:
            router.add(Candidate(name=name, room=2))
            running[name] = 0
        elif kind == "remove":
            router.remove(name)
            running.pop(name, None)
        elif kind == "release" and running.get(name, 0) > 0:
            router.release(name)
            running[name] -= 1
        elif kind == "place":
            chosen = router.place(Need(checkpoint=checkpoint), waited_s=1e9)
            assert (chosen is None) == all(number == 2 for number in running.values())
            if chosen is not None:
                running[chosen] += 1
                assert running[chosen] <= 2
        assert router.num_idle() == sum(1 for number in running.values() if number < 2)
