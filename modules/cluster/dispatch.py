"""Gives pieces of jobs to workers, follows them, and gives a piece to another worker if one is lost.

Knows workers only through a `Fleet`. A heartbeat thread reads their reports; every job has its own thread, which waits here for a worker.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from modules.cluster.backlog import Backlog
from modules.cluster.fleet import ClusterError, Fleet, Progress, WorkerLostError, WorkerRefusesError, read_progress
from modules.cluster.handing_over import hand_over
from modules.cluster.orders import Order, Outcome, unpack_outcome
from modules.cluster.reports import WorkerReport, read_report
from modules.cluster.routing import Candidate, Need, Router
from modules.cluster.values import MessageError
from modules.cluster.versions import find_differences, refusal

log = logging.getLogger(__name__)

MAX_TRIES_AGAIN = 2
HEARTBEAT_S = 1.0
MISSED_BEATS = 5
"""A worker whose report is missing this often in a row gets no more jobs; those that run there end by their own calls."""
NO_WORKER_S = 600.0
_SPEED_KEPT = 0.7


@dataclass(kw_only=True, slots=True)
class WorkerView:
    """A worker as the panel shows it. `refused` is the reason why it gets no jobs, `busy_s` the time that its orders took there,
    `speed` what was measured, in megapixel steps per second."""

    report: WorkerReport
    refused: str = ""
    is_draining: bool = False
    num_running: int = 0
    num_missed: int = 0
    speed: float | None = None
    busy_s: float = 0.0


@dataclass(kw_only=True, slots=True)
class PieceWork:
    """A piece of a job. `make_order` is called with a new id for every try; `picture_work` is in megapixel steps per picture. `on_progress` and
    `wanted_actions` connect it with the job's state."""

    make_order: Callable[[str], Order]
    need: Need
    num_pictures: int
    picture_work: float
    task_id: str
    sources: Mapping[str, Path] = field(default_factory=dict)
    on_progress: Callable[[Progress], None] = lambda progress: None
    wanted_actions: Callable[[], Sequence[str]] = tuple
    on_comment: Callable[[str], None] = lambda text: None
    first_worker: str | None = None


class Stopped(Exception):
    """The job was interrupted while it waited for a worker."""


class Dispatcher:
    """Owner of the router. Methods may be called from any thread."""

    def __init__(
        self,
        fleet: Fleet,
        versions: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
        no_worker_s: float = NO_WORKER_S,
        before_beat: Callable[[], None] = lambda: None,
        on_change: Callable[[int], None] = lambda num_workers: None,
    ) -> None:
        """`before_beat` is called every second; `on_change` is told the number of workers that take jobs whenever it changes."""
        self.router = Router()
        self._fleet = fleet
        self._versions = versions
        self._clock = clock
        self._no_worker_s = no_worker_s
        self._before_beat = before_beat
        self.on_change = on_change
        self._changed = threading.Condition()
        self._backlog: Backlog[dict[str, str | None]] = Backlog(self.router)
        self._views: dict[str, WorkerView] = {}
        self._drained: set[str] = set()
        self._num_open = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.num_tries_again = 0

    # Workers

    def start(self) -> None:
        """Read reports now, and every second from now on."""
        self.beat()
        self._thread = threading.Thread(target=self._beat_until_closed, name="cluster-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(5)

    def _beat_until_closed(self) -> None:
        while not self._stopping.wait(HEARTBEAT_S):
            self.beat()

    def beat(self) -> None:
        """Read the workers' reports once."""
        self._before_beat()
        reports: dict[str, WorkerReport] = {}
        for raw in self._fleet.reports():
            try:
                report = read_report(raw)
            except MessageError as error:
                log.warning("A worker's report cannot be read: %s", error)
                continue
            reports[report.worker] = report
        with self._changed:
            for report in reports.values():
                self._enter(report)
            for name in [name for name in self._views if name not in reports]:
                self._note_missing(name)
            self._pump()
        self._tell_change()

    def _tell_change(self) -> None:
        num_open = sum(1 for view in self.views() if not view.refused and not view.is_draining)
        if num_open != self._num_open:
            self._num_open = num_open
            self.on_change(num_open)

    def views(self) -> list[WorkerView]:
        """The workers, by machine and name."""
        with self._changed:
            views = [replace(view) for view in self._views.values()]
        return sorted(views, key=lambda view: (view.report.machine, view.report.worker))

    def num_waiting(self) -> int:
        """Pieces that wait for a worker."""
        with self._changed:
            return len(self._backlog)

    def drain(self, worker: str, *, is_draining: bool = True) -> None:
        """Give a worker, or every worker of a machine, no new jobs; or give it jobs again. Raises ClusterError if there is none of this name."""
        with self._changed:
            found = [view for view in self._views.values() if worker in (view.report.worker, view.report.machine)]
            if not found:
                known = ", ".join(sorted({view.report.machine for view in self._views.values()})) or "none"
                raise ClusterError(f"There is no worker or machine {worker[:80]!r}. Connected machines: {known}.")
            for view in found:
                view.is_draining = is_draining
                (self._drained.add if is_draining else self._drained.discard)(view.report.worker)
                self._offer(view)
            self._pump()
        self._tell_change()

    def _enter(self, report: WorkerReport) -> None:
        view = self._views.get(report.worker)
        if view is None:
            view = self._views[report.worker] = WorkerView(report=report, is_draining=report.worker in self._drained)
            differences = find_differences(self._versions, report.versions)
            view.refused = refusal(f"{report.worker} on {report.machine}", differences) if differences else ""
            log.log(logging.WARNING if differences else logging.INFO, "%s", view.refused or f"Worker {report.worker} on {report.machine} joined.")
        view.report, view.num_missed = report, 0
        if report.worker not in self.router and not report.running:  # after a lost connection it may still be busy with what it had
            self._offer(view)

    def _offer(self, view: WorkerView) -> None:
        """Let the router know a worker as it is now."""
        report, before = view.report, self.router.find(view.report.worker)
        candidate = Candidate(
            name=report.worker,
            checkpoint=report.checkpoint if before is None else before.checkpoint,
            networks=report.networks if before is None else before.networks,
            total_bytes=report.largest_slot_bytes,
            speed=self._speed_of(view),
            room=1 - view.num_running,
            is_open=not view.refused and not view.is_draining,
        )
        self.router.add(candidate)

    def _speed_of(self, view: WorkerView) -> float:
        """Measured speed relative to the mean of all workers; 1 until there is a measurement."""
        speeds = [other.speed for other in self._views.values() if other.speed]
        return view.speed / (sum(speeds) / len(speeds)) if view.speed and speeds else 1.0

    def _note_missing(self, name: str) -> None:
        view = self._views[name]
        view.num_missed += 1
        if view.num_missed < MISSED_BEATS:
            return
        self._forget(name, "no longer answers")

    def _forget(self, name: str, why: str) -> None:
        if self._views.pop(name, None) is not None:
            log.warning("Worker %s %s.", name, why)
        self.router.remove(name)

    # Pieces

    def reserve_more(self, need: Need, num_workers: int, *, first: str, work: float) -> list[tuple[str, float]]:
        """Up to `num_workers` idle workers for further pieces of a job of `work` megapixel steps, with their speeds. Does not wait.

        Workers that would have to load the model count only if half the work takes the worker `first` longer than a load.
        """
        found: list[tuple[str, float]] = []
        with self._changed:
            view = self._views.get(first)
            speed = None if view is None else view.speed
            pays = speed is None or work / speed / 2 > self.router.load_s
            while len(found) < num_workers and not len(self._backlog) and (pays or self.router.has_idle(need.checkpoint)):
                name = self.router.place(need, waited_s=float("inf"))
                if name is None:
                    break
                self._note_start(name)
                worker = self.router.find(name)
                found.append((name, worker.speed if worker else 1.0))
        return found

    def num_idle(self) -> int:
        with self._changed:
            return self.router.num_idle()

    def reserve(self, need: Need, is_stopped: Callable[[], bool] = lambda: False) -> str:
        """A worker for a piece; blocks until there is one. Raises Stopped, and ClusterError if no worker has been there for a long time."""
        ticket: dict[str, str | None] = {"worker": None}
        with self._changed:
            began_s = self._clock()
            number = self._backlog.add(ticket, need, began_s)
            try:
                while True:
                    self._pump()
                    if ticket["worker"] is not None:
                        return ticket["worker"]
                    if is_stopped():
                        raise Stopped
                    self._check_hope(need, self._clock() - began_s)
                    self._changed.wait(min(0.25, self._backlog.seconds_to_next_change(self._clock()) or 0.25))
            finally:
                self._backlog.remove(number)

    def _check_hope(self, need: Need, waited_s: float) -> None:
        usable = [view for view in self._views.values() if not view.refused]
        if waited_s > self._no_worker_s and not usable:
            raise ClusterError(f"No worker has joined for {waited_s:.0f} s. Start one: python -m modules.cluster worker --address HEAD.")
        if usable and need.need_bytes > max(view.report.largest_slot_bytes or need.need_bytes for view in usable):
            raise ClusterError(f"No connected worker has a GPU with {need.need_bytes / 2**30:.1f} GiB for this model.")

    def _pump(self) -> None:
        """Give workers to waiting pieces. Call under the lock."""
        placed = self._backlog.place_next(self._clock())
        while placed is not None:
            ticket, worker = placed
            ticket["worker"] = worker
            self._note_start(worker)
            self._changed.notify_all()
            placed = self._backlog.place_next(self._clock())

    def _note_start(self, worker: str) -> None:
        if worker in self._views:
            self._views[worker].num_running += 1

    def release(self, worker: str) -> None:
        """A piece has ended there."""
        with self._changed:
            if worker in self._views:
                self._views[worker].num_running -= 1
            self.router.release(worker)
            self._pump()
            self._changed.notify_all()

    def run(self, work: PieceWork) -> Outcome:
        """The outcome of a piece. Blocks. Raises Stopped, ClusterError, and what the worker's job raised."""
        excluded: set[str] = set()
        lost: list[str] = []
        refusals: list[str] = []
        worker = work.first_worker
        while True:
            if worker is None:
                worker = self.reserve(replace(work.need, excluded=self._excludable(excluded)), lambda: "interrupt" in work.wanted_actions())
            try:
                outcome = self._run_on(worker, f"{work.task_id}.{len(lost) + len(refusals)}", work)
            except WorkerLostError as error:
                lost.append(worker)
                log.warning("Job %s: worker %s was lost (%s).", work.task_id, worker, error)
                self._lose(worker)
                if len(lost) > MAX_TRIES_AGAIN:
                    raise ClusterError(
                        f"The job was given up: the workers {', '.join(lost)} were lost one after another while they worked on it."
                    ) from None
                self.num_tries_again += 1
            except WorkerRefusesError as error:
                refusals.append(f"{worker}: {error}")
                log.warning("Job %s: worker %s cannot do it: %s", work.task_id, worker, error)
                if not self._others(excluded | {worker}):
                    raise ClusterError("No worker can do this job. " + " ".join(refusals)) from None
            else:
                if lost:
                    work.on_comment(f"Made again on {worker} after {', '.join(lost)} {'was' if len(lost) == 1 else 'were'} lost.")
                return outcome
            finally:
                self.release(worker)
            excluded.add(worker)
            worker = None

    def _excludable(self, excluded: set[str]) -> frozenset[str]:
        """Workers to avoid; none if they are all there are."""
        return frozenset(excluded) if self._others(excluded) else frozenset()

    def _others(self, excluded: set[str]) -> bool:
        with self._changed:
            return any(view.report.worker not in excluded and not view.refused for view in self._views.values())

    def _lose(self, worker: str) -> None:
        """The worker is lost until it reports again, as a worker without jobs."""
        with self._changed:
            self._forget(worker, "was lost")
        self._tell_change()

    def _run_on(self, worker: str, order_id: str, work: PieceWork) -> Outcome:
        began_s = self._clock()
        order = work.make_order(order_id)
        hand_over(self._fleet, worker, order, work.sources)
        try:
            outcome = unpack_outcome(self._follow(worker, order_id, work), most_pictures=work.num_pictures)
        except MessageError as error:
            raise WorkerRefusesError(f"its answer cannot be read: {error}") from error
        finally:
            self._forget_order(worker, order_id)
        self._note_speed(worker, work.picture_work * len(outcome.pictures), outcome, self._clock() - began_s)
        return outcome

    def _follow(self, worker: str, order_id: str, work: PieceWork) -> bytes:
        known_preview, told = -1, set[str]()
        while True:
            for action in work.wanted_actions():
                if action not in told:
                    self._fleet.control(worker, order_id, action.split()[0])
                    told.add(action)
            progress = read_progress(self._fleet.follow(worker, order_id, known_preview))
            if progress.outcome is not None:
                return progress.outcome
            known_preview = max(known_preview, progress.preview_id)
            work.on_progress(progress)

    def _forget_order(self, worker: str, order_id: str) -> None:
        try:
            self._fleet.control(worker, order_id, "forget")
        except WorkerLostError:
            log.debug("Worker %s was lost after order %s.", worker, order_id)

    def _note_speed(self, worker: str, work: float, outcome: Outcome, whole_s: float) -> None:
        with self._changed:
            self.router.note_times(job_s=whole_s, load_s=outcome.load_s or None)
            view = self._views.get(worker)
            if view is not None:
                view.busy_s += outcome.run_s
            computing_s = outcome.run_s - outcome.load_s
            if view is None or not work or computing_s <= 0:
                return
            measured, before = work / computing_s, view.speed
            view.speed = measured if before is None else _SPEED_KEPT * before + (1 - _SPEED_KEPT) * measured
            candidate = self.router.find(worker)
            if candidate is not None:
                candidate.speed = self._speed_of(view)
