from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from modules.errors import JobCancelled, OptionError, QueueFullError, RequestError, ServerClosingError
from modules.jobs.queue import FIFOLock, JobQueue, error_html, wrap_gradio_call
from modules.jobs.state import State


@pytest.fixture
def jobs() -> Iterator[JobQueue]:
    queue = JobQueue(State())
    yield queue
    queue.close()


def test_jobs_run_in_order_on_one_thread(jobs: JobQueue) -> None:
    seen: list[tuple[int, str]] = []
    gate = threading.Event()
    submitted = [jobs.submit(None, "wait", lambda: gate.wait(5))]
    submitted += [jobs.submit(f"task(t{i})", "count", lambda i=i: seen.append((i, threading.current_thread().name))) for i in range(5)]
    gate.set()
    for job in submitted:
        job.wait(5)
    assert seen == [(i, "job-worker") for i in range(5)]


def test_the_result_and_the_error_reach_the_waiter(jobs: JobQueue) -> None:
    def fail() -> None:
        raise OptionError("setting x: wrong")

    assert jobs.run_and_wait(None, "ok", lambda: 41 + 1) == 42
    with pytest.raises(OptionError, match="setting x"):
        jobs.run_and_wait(None, "bad", fail)
    assert jobs.run_and_wait(None, "after", lambda: "still here") == "still here"


def test_an_unexpected_error_is_logged_and_reaches_the_waiter(jobs: JobQueue, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError):
        jobs.run_and_wait(None, "bad", lambda: 1 / 0)
    assert "Job bad failed" in caplog.text


def test_task_ids_move_from_pending_to_current_to_finished(jobs: JobQueue) -> None:
    gate, started = threading.Event(), threading.Event()

    def hold() -> str:
        started.set()
        gate.wait(5)
        return "done"

    first = jobs.submit("task(a)", "hold", hold)
    started.wait(5)
    second = jobs.submit("task(b)", "next", lambda: None)
    assert (jobs.tasks.current, list(jobs.tasks.pending), jobs.state.job) == ("task(a)", ["task(b)"], "hold")
    gate.set()
    first.wait(5)
    second.wait(5)
    assert jobs.tasks.finished == ["task(a)", "task(b)"]
    assert jobs.tasks.wait_for_result("task(a)", 1) == "done"
    assert jobs.state.job == ""


def test_a_waiting_job_can_be_cancelled(jobs: JobQueue) -> None:
    gate = threading.Event()
    jobs.submit("task(a)", "hold", lambda: gate.wait(5))
    waiting = jobs.submit("task(b)", "next", lambda: pytest.fail("it must not run"))
    assert jobs.cancel("task(b)") is True
    assert jobs.cancel("task(b)") is False
    gate.set()
    with pytest.raises(JobCancelled, match="canceled"):
        waiting.wait(5)


def test_a_job_may_submit_another_and_wait_for_it(jobs: JobQueue) -> None:
    assert jobs.run_and_wait(None, "outer", lambda: jobs.run_and_wait(None, "inner", lambda: "both")) == "both"


def test_closing_drops_what_waits_and_interrupts_what_runs() -> None:
    jobs = JobQueue(State())
    started = threading.Event()

    def until_interrupted() -> None:
        started.set()
        while not jobs.state.interrupted:
            threading.Event().wait(0.01)

    running = jobs.submit(None, "long", until_interrupted)
    waiting = jobs.submit(None, "next", lambda: None)
    started.wait(5)
    jobs.close()
    running.wait(5)
    with pytest.raises(JobCancelled):
        waiting.wait(5)
    with pytest.raises(JobCancelled, match="shutting down"):
        jobs.submit(None, "late", lambda: None)


def test_flags_of_the_last_job_are_forgotten(jobs: JobQueue) -> None:
    jobs.run_and_wait(None, "first", jobs.state.interrupt)
    assert jobs.run_and_wait(None, "second", lambda: jobs.state.interrupted) is False


def test_the_lock_is_first_in_first_out_and_reentrant() -> None:
    lock, order, threads = FIFOLock(), list[int](), list[threading.Thread]()

    def take(number: int) -> None:
        with lock:
            order.append(number)

    with lock, lock:
        for number in range(4):
            thread = threading.Thread(target=take, args=(number,))
            thread.start()
            threads.append(thread)
            while len(lock._waiting) <= number:
                threading.Event().wait(0.001)
        assert lock.acquire(blocking=False) is True
        lock.release()
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2, 3]


def test_a_lock_is_released_by_its_holder_only() -> None:
    with pytest.raises(RuntimeError, match="does not hold"):
        FIFOLock().release()


def test_handlers_show_errors_as_text_not_as_markup() -> None:
    def fail() -> tuple[str]:
        raise RequestError("<script>no</script>")

    assert wrap_gradio_call(fail)() == (None, "", "<div class='error'>&lt;script&gt;no&lt;/script&gt;</div>")
    assert "KeyError" in error_html(KeyError("x"))
    outputs = wrap_gradio_call(lambda: ("a", "b"), add_stats=True)()
    assert outputs[0] == "a"
    assert "Time taken" in outputs[1]


def test_the_line_has_a_limit_and_a_closed_one_can_be_opened_again() -> None:
    jobs, gate, started = JobQueue(State(), max_waiting=2), threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        gate.wait(5)

    jobs.submit(None, "hold", hold)
    assert started.wait(5)
    waiting = [jobs.submit(None, "next", lambda: None) for _ in range(2)]
    for refused in (jobs.check_room, lambda: jobs.submit(None, "late", lambda: None)):
        with pytest.raises(QueueFullError, match="2 jobs are already waiting") as error:
            refused()
        assert (error.value.status, error.value.retry_after_s) == (503, 10)
    gate.set()
    for job in waiting:
        job.wait(5)
    jobs.check_room()
    jobs.close()
    with pytest.raises(ServerClosingError) as closing:
        jobs.check_room()
    assert closing.value.status == 503
    jobs.reopen()
    assert jobs.run_and_wait(None, "again", lambda: 7) == 7
    jobs.close()


def test_whoever_asks_is_called_when_a_job_is_over(jobs: JobQueue) -> None:
    gate, called = threading.Event(), list[str]()
    job = jobs.submit(None, "hold", lambda: gate.wait(5))
    job.add_done_callback(lambda: called.append("before"))
    gate.set()
    job.wait(5)
    job.add_done_callback(lambda: called.append("after"))
    assert called[-1] == "after" and set(called) <= {"before", "after"}
    jobs.run_and_wait(None, "next", lambda: None)
    assert sorted(called) == ["after", "before"]


def test_an_abandoned_job_leaves_the_line_or_is_interrupted_and_no_other_is(jobs: JobQueue) -> None:
    started = threading.Event()

    def until_interrupted() -> str:
        started.set()
        while not jobs.state.interrupted:
            threading.Event().wait(0.001)
        return "interrupted"

    running = jobs.submit(None, "long", until_interrupted)
    waiting = jobs.submit(None, "next", lambda: pytest.fail("it must not run"))
    last = jobs.submit(None, "last", lambda: jobs.state.interrupted)
    assert started.wait(5)
    jobs.abandon(waiting)
    with pytest.raises(JobCancelled, match="disconnected"):
        waiting.wait(5)
    jobs.abandon(running)
    assert running.wait(5) == "interrupted"
    assert last.wait(5) is False
    jobs.abandon(running)
    assert not jobs.state.interrupted


def test_people_see_move_end_and_repeat_jobs(jobs: JobQueue) -> None:
    started, gate, done = threading.Event(), threading.Event(), list[str]()

    def hold() -> None:
        started.set()
        gate.wait(5)

    def add(word: str, task_id: str) -> object:
        return jobs.submit(task_id, "txt2img", lambda: done.append(word), label=word, repeat=lambda again: add(word, again))

    running = jobs.submit(None, "hold", hold)
    started.wait(5)
    waiting = {word: add(word, f"task({word})") for word in "abcd"}
    number = {line.label: line.number for line in jobs.lines()}
    assert [(line.label, line.state) for line in jobs.lines()] == [("", "running"), *((word, "waiting") for word in "abcd")]
    assert jobs.move(number["d"], -2)
    assert jobs.move(number["a"], 99)
    assert [line.label for line in jobs.lines()][1:] == list("dbca")
    assert list(jobs.tasks.pending) == [f"task({word})" for word in "dbca"]  # what the page says of the place in line
    assert jobs.end(number["c"])
    assert not jobs.end(number["c"])
    assert not jobs.move(number["c"], 1)
    repeated = jobs.repeat(number["b"], "task(again)")
    gate.set()
    for job in (running, waiting["a"], repeated):
        job.wait(5)  # type: ignore[attr-defined]
    assert done == ["d", "b", "a", "b"]
    assert {line.label: line.state for line in jobs.lines()} == {"": "done", "b": "done", "d": "done", "a": "done", "c": "canceled"}
    with pytest.raises(RequestError, match="cannot be repeated"):
        jobs.repeat(running.number, "task(x)")
    with pytest.raises(RequestError, match="cannot be repeated"):
        jobs.repeat(10**6, "task(x)")


def test_a_failed_and_an_interrupted_job_say_so(jobs: JobQueue) -> None:
    def fail() -> None:
        raise RequestError("there is no such thing")

    def until_interrupted() -> None:
        jobs.end(jobs.lines()[0].number)
        assert jobs.state.interrupted

    with pytest.raises(RequestError):
        jobs.run_and_wait(None, "one", fail)
    jobs.run_and_wait(None, "two", until_interrupted)
    two, one = jobs.lines()
    assert (one.state, one.error) == ("failed", "there is no such thing")
    assert two.state == "interrupted"
    assert two.seconds is not None
