from __future__ import annotations

from modules.cluster.backlog import OVERDUE_LOADS, Backlog
from modules.cluster.routing import Candidate, Need, Router


def backlog_of(*workers: Candidate) -> tuple[Backlog[str], Router]:
    router = Router(load_s=10, job_s=5)
    for worker in workers:
        router.add(worker)
    return Backlog(router), router


def test_jobs_are_placed_in_order_of_arrival() -> None:
    backlog, _ = backlog_of(*[Candidate(name=f"w{i}", checkpoint="x") for i in range(3)])
    for key in ("first", "second", "third"):
        backlog.add(key, Need(checkpoint="x"), 0)
    assert [(backlog.place_next(0) or ("", ""))[0] for _ in range(3)] == ["first", "second", "third"]
    assert backlog.place_next(0) is None
    assert len(backlog) == 0


def test_a_job_whose_checkpoint_is_loaded_goes_before_an_older_one_that_would_cost_a_load() -> None:
    backlog, router = backlog_of(Candidate(name="w", checkpoint="x"))
    backlog.add("old", Need(checkpoint="y"), 0)
    backlog.add("young", Need(checkpoint="x"), 1)
    assert backlog.place_next(2) == ("young", "w")
    router.release("w")
    assert backlog.place_next(3) == ("old", "w")


def test_an_overdue_job_goes_first_whatever_it_costs() -> None:
    backlog, _ = backlog_of(Candidate(name="w", checkpoint="x"))
    backlog.add("old", Need(checkpoint="y"), 0)
    backlog.add("young", Need(checkpoint="x"), 1)
    assert backlog.place_next(10 * OVERDUE_LOADS + 1) == ("old", "w")


def test_a_job_that_may_not_run_where_there_is_room_holds_up_nobody() -> None:
    backlog, _ = backlog_of(Candidate(name="w", checkpoint="x"))
    backlog.add("burnt", Need(checkpoint="x", excluded=frozenset({"w"})), 0)
    backlog.add("other", Need(checkpoint="x"), 1)
    assert backlog.place_next(2) == ("other", "w")
    assert len(backlog) == 1


def test_a_job_that_is_removed_is_not_placed() -> None:
    backlog, _ = backlog_of(Candidate(name="w"))
    number = backlog.add("gone", Need(checkpoint="x"), 0)
    backlog.remove(number)
    backlog.remove(number)
    assert backlog.place_next(1) is None
    assert backlog.seconds_to_next_change(1) is None


def test_a_clock_that_was_set_back_only_makes_jobs_younger() -> None:
    backlog, router = backlog_of(Candidate(name="w", checkpoint="x"), Candidate(name="v", checkpoint="y"))
    router.place(Need(checkpoint="x"))
    backlog.add("job", Need(checkpoint="x"), 1000)
    assert backlog.place_next(0) is None
    assert backlog.place_next(1010) == ("job", "v")
