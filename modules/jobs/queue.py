"""One queue of jobs for page and API, and the one thread that runs them.

A job is a function; its result or error goes to whoever waits for it. Knows nothing about pictures.
"""

from __future__ import annotations

import contextvars
import html
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, Protocol, TypeVar

from modules import errors
from modules.errors import JobCancelled, QueueFullError, RequestError, ServerClosingError
from modules.jobs.context import required_context
from modules.jobs.current import current_job_id
from modules.jobs.meter import JobMeter
from modules.jobs.progress import TaskBook, create_task_id
from modules.jobs.state import State

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

MAX_WAITING_JOBS = 256
ENDED_JOBS_KEPT = 24
LABEL_CHARACTERS = 200


class FIFOLock:
    """A lock granted in order of request. Reentrant: its holder may acquire it again."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._owner: int | None = None
        self._depth = 0

    def acquire(self, blocking: bool = True) -> bool:
        me = threading.get_ident()
        with self._guard:
            if self._owner in (None, me):
                self._owner, self._depth = me, self._depth + 1
                return True
            if not blocking:
                return False
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()
        with self._guard:
            self._owner = me  # the releasing thread left the lock taken (depth 1) for us
        return True

    def release(self) -> None:
        with self._guard:
            if self._owner != threading.get_ident():
                raise RuntimeError("release of a lock that this thread does not hold")
            self._depth -= 1
            if self._depth:
                return
            self._owner = None
            if self._waiting:
                self._owner, self._depth = -1, 1
                self._waiting.popleft().set()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


# taken by extensions that compute outside a job, and by the worker for each job
queue_lock = FIFOLock()


class Kept:
    """What was raised inside of keeping_errors()."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def take(self) -> Exception | None:
        """The error, which is then not kept any longer."""
        error, self.error = self.error, None
        return error


@contextmanager
def keeping_errors() -> Iterator[Kept]:
    """The wall around a job and around a handler of the page: what is raised inside goes no further, and is kept for whoever tells the user."""
    kept = Kept()
    try:
        yield kept
    except Exception as error:  # noqa: BLE001 - wall: the job worker
        kept.error = error


Repeat = Callable[[str], "Job[Any]"]
"""Submits the same job under a new task id."""


class Job(Generic[ResultT]):
    """A job in the queue. `wait()` returns its result or raises its error. `label` says to people what it makes."""

    def __init__(self, task_id: str, name: str, run: Callable[[], ResultT], *, owner: str | None = None, runs_elsewhere: bool = False) -> None:
        self.task_id = task_id
        self.name = name
        self.run = run
        self.owner = owner
        self.runs_elsewhere = runs_elsewhere
        self.submitted_s = time.monotonic()
        self.label = ""
        self.repeat: Repeat | None = None
        self.number = 0
        self.started_at: float | None = None
        self.context = contextvars.copy_context()
        self.done = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._callbacks_lock = threading.Lock()
        self.result: ResultT | None = None
        self.error: BaseException | None = None

    def wait(self, timeout_s: float | None = None) -> ResultT:
        """Block until the job has ended. Raises its error, or TimeoutError."""
        if not self.done.wait(timeout_s):
            raise TimeoutError(f"job {self.name} ({self.task_id}) has not finished after {timeout_s} s")
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]  # set by whoever set `done`

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the job ends, on the thread that ends it; immediately if it has already ended."""
        with self._callbacks_lock:
            if not self.done.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def finish(self) -> None:
        """Mark the job as ended: `result` or `error` is set. Wakes all waiters."""
        with self._callbacks_lock:
            self.done.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def carry_out(self) -> None:
        """Run the job on this thread; whatever it raises is stored for the waiter."""
        with keeping_errors() as kept:
            self.result = self.context.run(self._run_named)
        error = self.error = kept.take()
        if error is None or isinstance(error, RequestError):
            return
        self.error = _explained(error, self.name)
        errors.record_exception(error)
        log.error("Job %s failed: %s: %s", self.name, type(self.error).__name__, self.error, exc_info=error)

    def _run_named(self) -> ResultT:
        current_job_id.set(self.task_id)
        return self.run()


def _explained(error: Exception, name: str) -> Exception:
    """An out-of-memory error, extended by what is held on every device; other errors are returned unchanged."""
    from backend import memory_management  # imports torch, which the queue itself does not need

    return memory_management.explain_shortage(error, f"the job {name}")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobLine:
    """A job as people see it: `state` is waiting, running, done, failed, canceled or interrupted; `seconds` it has run."""

    number: int
    task_id: str
    name: str
    label: str
    state: str
    seconds: float | None = None
    error: str = ""
    can_repeat: bool = False


class Journal(Protocol):
    """Where accepted jobs are written down, so that they survive the process; see modules.cluster."""

    def accept(self, task_id: str, name: str, request: Any) -> None:
        """Raises an error if the job cannot be kept; it is then not accepted."""

    def end(self, task_id: str) -> None:
        """The job has ended, successfully or not."""


def choose_fairly(waiting: Sequence[Job[Any]], running: Sequence[Job[Any]]) -> Job[Any]:
    """The oldest waiting job of the owner with the fewest running jobs; first come, first served among owners that are level.

    For example, while two jobs of ann run and none of bob, bob's job goes before ann's third.
    """
    num_running = Counter(job.owner for job in running)
    return min(waiting, key=lambda job: num_running[job.owner])  # min() keeps the order of equals


class JobQueue:
    """First in, first out, unless somebody moves a waiting job.

    Worker threads start with the first job and are daemons, so they never delay the end of the program.

    At most `max_waiting` jobs wait at a time. On one machine one job runs at a time. A cluster's front raises `max_running`: jobs with a `request`
    then run side by side, each with its own state, shared fairly between owners; other jobs still take turns, because they use this machine.
    """

    def __init__(self, state: State, max_waiting: int = MAX_WAITING_JOBS) -> None:
        self.state = state
        self.max_waiting = max_waiting
        self.tasks = TaskBook()
        self.meter = JobMeter()
        self.journal: Journal | None = None
        self._max_running = 1
        self._waiting: deque[Job[Any]] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._running: list[Job[Any]] = []
        self._numbers = itertools.count(1)
        self._ended: deque[tuple[JobLine, Repeat | None]] = deque(maxlen=ENDED_JOBS_KEPT)
        self._workers: list[threading.Thread] = []
        self._closed = False

    @property
    def max_running(self) -> int:
        return self._max_running

    @max_running.setter
    def max_running(self, value: int) -> None:
        with self._changed:
            self._max_running = max(1, value)
            self._start_workers()
            self._changed.notify_all()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(
        self, task_id: str | None, name: str, run: Callable[[], ResultT], *, request: Any = None, label: str = "", repeat: Repeat | None = None
    ) -> Job[ResultT]:
        """Append a job to the queue. Called from inside a job, it runs immediately, because waiting for itself would deadlock.

        `request`: what `run` processes, if it is a request for pictures. `label` says to people what it makes, `repeat` submits it again.
        Raises ServerClosingError and QueueFullError.
        """
        is_elsewhere = request is not None and self.journal is not None
        job: Job[ResultT] = Job(task_id or create_task_id(name), name, run, owner=getattr(request, "user", None), runs_elsewhere=is_elsewhere)
        job.label, job.repeat = label[:LABEL_CHARACTERS], repeat
        if threading.current_thread() in self._workers:
            job.carry_out()
            job.finish()
            return job
        with self._changed:
            self.check_room()
            job.number = next(self._numbers)
            if self.journal is not None and request is not None:
                self.journal.accept(job.task_id, name, request)
            self.tasks.add(job.task_id)
            self._waiting.append(job)
            self._start_workers()
            self._changed.notify_all()
        return job

    def check_room(self) -> None:
        """Raises ServerClosingError and QueueFullError where submit() would."""
        with self._changed:
            if self._closed:
                raise ServerClosingError("the server is shutting down and accepts no more jobs.")
            if len(self._waiting) >= self.max_waiting:
                self.meter.num_refused += 1
                raise QueueFullError(f"{len(self._waiting)} jobs are already waiting; the queue is full. Try again later.")

    def run_and_wait(self, task_id: str | None, name: str, run: Callable[[], ResultT], *, request: Any = None) -> ResultT:
        """submit() and wait()."""
        return self.submit(task_id, name, run, request=request).wait()

    def cancel(self, task_id: str) -> bool:
        """Remove a waiting job from the queue; returns whether it was there. Its waiter gets JobCancelled."""
        with self._changed:
            job = next((waiting for waiting in self._waiting if waiting.task_id == task_id), None)
            if job is None:
                return False
            self._waiting.remove(job)
        self._drop(job, JobCancelled(f"job {job.name} ({job.task_id}): canceled before it started."))
        return True

    def lines(self) -> list[JobLine]:
        """The running jobs, then those that wait in their order, then those that have ended, the last first."""
        with self._changed:
            running = [_line(job, "running") for job in self._running]
            return [*running, *(_line(job, "waiting") for job in self._waiting), *(line for line, _ in reversed(self._ended))]

    def move(self, number: int, places: int) -> bool:
        """Move the waiting job `number` by `places` (negative: forward) as far as there are any; returns whether it waits."""
        with self._changed:
            job = next((waiting for waiting in self._waiting if waiting.number == number), None)
            if job is None:
                return False
            place = min(len(self._waiting) - 1, max(0, self._waiting.index(job) + places))
            self._waiting.remove(job)
            self._waiting.insert(place, job)
            self.tasks.arrange([waiting.task_id for waiting in self._waiting])
        return True

    def end(self, number: int) -> bool:
        """Cancel the job `number` if it waits, interrupt it if it runs; returns whether it did either."""
        with self._changed:
            running = next((job for job in self._running if job.number == number), None)
            if running is not None:
                self.state.of_job(running.task_id).interrupt()
                return True
            task_id = next((waiting.task_id for waiting in self._waiting if waiting.number == number), None)
        return task_id is not None and self.cancel(task_id)

    def repeat(self, number: int, task_id: str) -> Job[Any]:
        """Queue the job `number` again. Raises: RequestError if it is forgotten or cannot be repeated; and as submit() does."""
        with self._changed:
            known = [job.repeat for job in (*self._running, *self._waiting) if job.number == number]
            known += [repeat for line, repeat in self._ended if line.number == number]
        repeat = next((one for one in known if one is not None), None)
        if repeat is None:
            raise RequestError(f"job {number} cannot be repeated: it is forgotten or came over the API. The last {ENDED_JOBS_KEPT} are remembered.")
        return repeat(task_id)

    def abandon(self, job: Job[Any]) -> None:
        """Nobody needs the job's result any more: remove it from the queue, or interrupt it if it runs."""
        with self._changed:
            is_waiting = job in self._waiting
            if is_waiting:
                self._waiting.remove(job)
            elif job in self._running:  # the next job starts under this lock and resets the flag
                self.state.of_job(job.task_id).interrupt()
        if is_waiting:
            self._drop(job, JobCancelled(f"job {job.name} ({job.task_id}): its client disconnected."))

    def reopen(self) -> None:
        """Accept jobs again after close()."""
        with self._changed:
            self._closed = False

    def close(self, timeout_s: float = 10.0) -> None:
        """Accept no more jobs, drop waiting ones, interrupt running ones and wait for them. Every waiter gets an answer.

        Jobs in the journal stay there: the next start runs them.
        """
        with self._changed:
            self._closed = True
            dropped = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for job in dropped:
            self._drop(job, ServerClosingError(f"job {job.name} ({job.task_id}): the server is shutting down."), is_kept=True)
        with self._changed:
            workers = [worker for worker in self._workers if worker is not threading.current_thread()]
            for job in self._running:
                self.state.of_job(job.task_id).interrupt()
        deadline_s = time.monotonic() + timeout_s
        for worker in workers:
            worker.join(max(0.0, deadline_s - time.monotonic()))

    def _drop(self, job: Job[Any], error: JobCancelled, *, is_kept: bool = False) -> None:
        with self._changed:
            self._ended.append((_line(job, "canceled"), job.repeat))
        self.tasks.finish(job.task_id)
        self.meter.num_ended["canceled"] += 1
        if not is_kept:
            self._end_in_journal(job)
        job.error = error
        job.finish()

    def _end_in_journal(self, job: Job[Any]) -> None:
        if job.runs_elsewhere and self.journal is not None:
            self.journal.end(job.task_id)

    def _start_workers(self) -> None:
        self._workers = [worker for worker in self._workers if worker.is_alive()]
        num_wanted = min(self._max_running, len(self._running) + len(self._waiting))
        while len(self._workers) < num_wanted:
            worker = threading.Thread(target=self._work, name="job-worker", daemon=True)
            self._workers.append(worker)
            worker.start()

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            with self.state.of_thread(job.task_id), self._turn_of(job):
                self._do(job)

    def _turn_of(self, job: Job[Any]) -> AbstractContextManager[Any]:
        return nullcontext() if job.runs_elsewhere else queue_lock

    def _next_job(self) -> Job[Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._waiting and len(self._running) < self._max_running))
            if not self._waiting:
                return None
            job = choose_fairly(self._waiting, self._running)
            self._waiting.remove(job)
            self.tasks.start(job.task_id)
            with self.state.of_thread(job.task_id):
                self.state.begin(job.name)
            job.started_at = time.time()
            self._running.append(job)
            self.meter.note_wait(time.monotonic() - job.submitted_s)
            return job

    def _do(self, job: Job[Any]) -> None:
        started_s = time.monotonic()
        try:
            job.carry_out()
            if job.error is None:
                self.tasks.record(job.task_id, job.result)
        finally:
            self.meter.note_end(time.monotonic() - started_s, is_failed=job.error is not None)
            if not (self._closed and self.state.of_job(job.task_id).interrupted):  # cut short by close(): the next start runs it again
                self._end_in_journal(job)
            with self._changed:
                self._running.remove(job)
                self._ended.append((_line(job, self._end_of(job)), job.repeat))
                self._changed.notify_all()
            self.state.end()
            self.state.drop(job.task_id)
            self.tasks.finish(job.task_id)
            job.finish()

    def _end_of(self, job: Job[Any]) -> str:
        if job.error is not None:
            return "failed"
        return "interrupted" if self.state.of_job(job.task_id).interrupted else "done"


def _line(job: Job[Any], state: str) -> JobLine:
    seconds = None if job.started_at is None else time.time() - job.started_at
    error = "" if job.error is None or state == "canceled" else str(job.error)
    return JobLine(
        number=job.number, task_id=job.task_id, name=job.name, label=job.label, state=state, seconds=seconds, error=error,
        can_repeat=job.repeat is not None,
    )  # fmt: skip


# Wrappers for the page's handlers, under the names that extensions import.


def wrap_queued_call(func: Callable[..., Any]) -> Callable[..., Any]:
    """`func` under the queue lock."""

    @wraps(func)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with queue_lock:
            return func(*args, **kwargs)

    return locked


def _is_task_id(value: object) -> bool:
    return isinstance(value, str) and value.startswith("task(") and value.endswith(")")


def wrap_gradio_gpu_call(func: Callable[..., Any], extra_outputs: Sequence[Any] | None = None) -> Callable[..., Any]:
    """`func` as a job: a first argument `task(...)` is its id. Errors become a line of HTML with the time taken."""

    def as_job(*args: Any, **kwargs: Any) -> Any:
        task_id = args[0] if args and _is_task_id(args[0]) else None
        return required_context().jobs.run_and_wait(task_id, func.__name__, lambda: func(*args, **kwargs))

    return wrap_gradio_call(as_job, extra_outputs=extra_outputs, add_stats=True)


def wrap_gradio_call(func: Callable[..., Any], extra_outputs: Sequence[Any] | None = None, add_stats: bool = False) -> Callable[..., Any]:
    """`func` with errors shown on the page: outputs `extra_outputs` (default [None, '']) and the message as HTML."""

    @wraps(func)
    def shown(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        with keeping_errors() as kept:
            outputs = list(func(*args, **kwargs))
        if kept.error is not None:
            outputs = [*(extra_outputs if extra_outputs is not None else [None, ""]), error_html(kept.error)]
            kept.take()
        if add_stats:
            outputs[-1] = f"{outputs[-1]}{_time_html(time.perf_counter() - started)}"
        return tuple(outputs)

    return shown


wrap_gradio_call_no_job = wrap_gradio_call


def error_html(error: BaseException) -> str:
    """The page's text for a failed job: the message, plus the error's type unless the error is meant for users."""
    text = str(error) if isinstance(error, RequestError) else f"{type(error).__name__}: {error}"
    return f"<div class='error'>{html.escape(text)}</div>"


def _time_html(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    text = f"{int(minutes)} min. {rest:.1f} sec." if minutes else f"{rest:.1f} sec."
    return f"<div class='performance'><p class='time'>Time taken: <wbr><span class='measurement'>{text}</span></p></div>"
