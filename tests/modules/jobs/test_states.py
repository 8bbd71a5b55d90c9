from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from modules.errors import RequestError
from modules.jobs.meter import BOUNDS_S, Histogram, JobMeter
from modules.jobs.progress import report_task
from modules.jobs.queue import JobQueue, choose_fairly, queue_lock
from modules.jobs.state import State
from modules.jobs.states import JobStates


class Notes:
    """A journal that remembers what it was told."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.refuses = False

    def accept(self, task_id: str, name: str, request: Any) -> None:
        if self.refuses:
            raise RequestError("disk full")
        self.open.append(task_id)

    def end(self, task_id: str) -> None:
        self.open.remove(task_id)


class Request:
    def __init__(self, user: str | None = None) -> None:
        self.user = user


@pytest.fixture
def front() -> Iterator[tuple[JobQueue, Notes]]:
    jobs, notes = JobQueue(JobStates()), Notes()
    jobs.journal, jobs.max_running = notes, 3
    yield jobs, notes
    jobs.close(5)


def test_a_job_sees_its_own_state_and_others_see_theirs(front: tuple[JobQueue, Notes]) -> None:
    jobs, _ = front
    together, seen = threading.Barrier(3, timeout=10), dict[str, Any]()

    def work(name: str) -> None:
        jobs.state.job_count, jobs.state.sampling_step = 1, len(name)
        together.wait()
        seen[name] = (jobs.state.job, jobs.state.sampling_step)
        together.wait()
        seen[f"{name} interrupted"] = jobs.state.interrupted

    submitted = [jobs.submit(f"task({name})", name, lambda name=name: work(name), request=Request()) for name in ("a", "bb")]
    together.wait()
    jobs.state.of_job("task(bb)").interrupt()
    assert report_task(jobs.tasks, jobs.state, "task(bb)").active
    together.wait()
    for job in submitted:
        job.wait(10)
    assert seen == {"a": ("a", 1), "bb": ("bb", 2), "a interrupted": False, "bb interrupted": True}
    assert jobs.state.job == ""
    assert jobs.state.running() == []


def test_commands_to_the_server_belong_to_no_job() -> None:
    states = JobStates()
    with states.of_thread("task(1)"):
        states.request_restart()
        assert states.interrupted
    assert states.wait_for_server_command(1) == "restart"
    assert states.of_job("task(2)").server_command is None


def test_a_state_per_job_has_what_a_state_has() -> None:
    states = JobStates()
    assert states.dict() == State().dict()
    with states.of_thread("task(1)"):
        states.begin("x")
        states.nextjob()
        assert (states.job_no, states.of_job("task(1)").job) == (1, "x")
    assert isinstance(states, State)


def test_jobs_of_this_machine_take_turns_while_others_run(front: tuple[JobQueue, Notes]) -> None:
    jobs, _ = front
    gate, held = threading.Event(), list[bool]()
    remote = jobs.submit(None, "remote", lambda: gate.wait(10), request=Request())
    here = [jobs.submit(None, "extras", lambda: held.append(queue_lock._owner == threading.get_ident())) for _ in range(3)]
    for job in here:
        job.wait(10)
    assert held == [True, True, True]
    gate.set()
    assert remote.wait(10) is True


def test_the_journal_knows_a_job_before_it_is_accepted_and_until_it_has_ended(front: tuple[JobQueue, Notes]) -> None:
    jobs, notes = front
    gate = threading.Event()
    job = jobs.submit("task(1)", "txt2img", lambda: gate.wait(10), request=Request())
    jobs.submit("task(2)", "extras", lambda: None).wait(10)
    assert notes.open == ["task(1)"]
    gate.set()
    job.wait(10)
    assert notes.open == []
    notes.refuses = True
    with pytest.raises(RequestError, match="disk full"):
        jobs.submit("task(3)", "txt2img", lambda: None, request=Request())
    assert "task(3)" not in jobs.tasks.pending


def test_what_did_not_end_by_itself_stays_in_the_journal(front: tuple[JobQueue, Notes]) -> None:
    jobs, notes = front
    jobs.max_running = 1
    started = threading.Event()

    def run() -> None:
        started.set()
        while not jobs.state.interrupted:
            threading.Event().wait(0.01)

    jobs.submit("task(running)", "txt2img", run, request=Request())
    jobs.submit("task(waiting)", "txt2img", lambda: None, request=Request())
    gone = jobs.submit("task(gone)", "txt2img", lambda: None, request=Request())
    started.wait(10)
    jobs.abandon(gone)
    jobs.close(10)
    assert notes.open == ["task(running)", "task(waiting)"]


def test_owners_take_turns() -> None:
    class Waiting:
        def __init__(self, name: str, owner: str | None) -> None:
            self.name, self.owner = name, owner

    waiting: Any = [Waiting("a3", "ann"), Waiting("a4", "ann"), Waiting("b1", "bob")]
    assert choose_fairly(waiting, [Waiting("a1", "ann"), Waiting("a2", "ann")]).name == "b1"  # type: ignore[list-item]
    assert choose_fairly(waiting, []).name == "a3"


def test_times_are_counted_by_bucket() -> None:
    histogram = Histogram()
    for seconds in (-1, 0, BOUNDS_S[0], 0.5, 1e9):
        histogram.note(seconds)
    assert histogram.cumulative()[0] == 3
    assert histogram.cumulative()[-2:] == [4, 5]
    meter = JobMeter()
    meter.note_end(1, is_failed=True)
    assert dict(meter.num_ended) == {"failed": 1}
