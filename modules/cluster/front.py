"""The front: makes the pictures of requests on workers, saves them here, and keeps accepted jobs. Knows no Ray.

front = ClusterFront(app, fleet, versions)     # then app.remote_engine makes the pictures, and app.jobs has room for many jobs
front.start()                                  # finds workers, takes up the jobs of the last run
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import secrets
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from modules.cluster.dispatch import Dispatcher, PieceWork, Stopped, WorkerView
from modules.cluster.fleet import Fleet
from modules.cluster.kept import pack_request, unpack_request
from modules.cluster.model_files import find_files, model_key_of
from modules.cluster.orders import Outcome, make_order, options_to_send
from modules.cluster.routing import Need
from modules.cluster.sharing import Piece, choose_num_workers, share_pictures
from modules.cluster.store import JobStore, KeptJob
from modules.cluster.values import MessageError
from modules.cluster.watch import Watch
from modules.errors import RequestError
from modules.jobs.current import current_job_id
from modules.jobs.state import State
from modules.processing import Processed, StableDiffusionProcessing, keep_overrides, set_folders, write_params
from modules.processing.chosen_script import process_with_scripts
from modules.processing.overrides import step_of

if TYPE_CHECKING:
    from modules.application import Application

log = logging.getLogger(__name__)

STORE_FILE = "cluster/jobs.sqlite3"
MAX_STARTS = 5
"""A job that was running at so many ends of the front is not taken up again: it may be what ended it."""
LOOKAHEAD = 8
"""Jobs taken from the queue beyond one per worker, so that a worker may get one that suits what it has loaded."""


class ClusterFront:
    """`remote_engine` and `journal` of the application."""

    def __init__(self, app: Application, fleet: Fleet, versions: Mapping[str, str], *, dispatcher: Dispatcher | None = None) -> None:
        """Opens the store in the data folder. Raises OSError."""
        self.app = app
        self.fleet = fleet
        self.store = JobStore(app.config.data_dir / STORE_FILE)
        self.dispatcher = dispatcher or Dispatcher(fleet, versions)
        self.dispatcher.on_change = self._fit_queue
        self._kept: set[str] = set()
        self._restored: set[str] = set()
        self._kept_lock = threading.Lock()
        self._run_name = secrets.token_hex(4)
        self._calls = itertools.count()
        app.remote_engine = self
        app.jobs.journal = self

    def start(self) -> None:
        """Look for workers from now on."""
        self._fit_queue(0)
        self.dispatcher.start()

    def take_up_jobs(self) -> None:
        """Put the jobs that an earlier run accepted and did not end back into the queue, however long it gets. Scripts must be loaded."""
        jobs, limit = self.store.read_all(), self.app.jobs.max_waiting
        self.app.jobs.max_waiting = max(limit, len(jobs))
        self._restored = {job.task_id for job in jobs}
        try:
            for job in jobs:
                self._take_up(job)
        finally:
            self._restored = set()
            self.app.jobs.max_waiting = limit

    def close(self) -> None:
        """After the job queue is closed. Jobs that have not ended stay in the store."""
        self.dispatcher.close()
        self.fleet.close()
        self.store.close()
        self.app.remote_engine = self.app.jobs.journal = None

    def _fit_queue(self, num_workers: int) -> None:
        self.app.jobs.max_running = num_workers + LOOKAHEAD

    def drain(self, worker: str, *, is_draining: bool = True) -> None:
        """Give a worker or a whole machine no new jobs, or give it jobs again. Raises ClusterError if there is none of this name."""
        self.dispatcher.drain(worker, is_draining=is_draining)

    def describe(self) -> dict[str, Any]:
        """The workers and their slots, as JSON."""
        dispatcher = self.dispatcher
        workers = [_describe_worker(view) for view in dispatcher.views()]
        return {"workers": workers, "waiting": dispatcher.num_waiting(), "retries": dispatcher.num_tries_again, "loads": dispatcher.router.num_loads}

    # Journal

    def accept(self, task_id: str, name: str, request: Any) -> None:
        """Write a request for pictures down; other jobs, such as a batch of uploaded pictures, live in memory only. Raises StoreError."""
        if not isinstance(request, StableDiffusionProcessing):
            return
        if task_id in self._restored:  # it is in the store already
            with self._kept_lock:
                self._kept.add(task_id)
            return
        try:
            message = pack_request(request, self.app.options.data_labels)
        except MessageError as error:
            log.info("Job %s will not survive a restart of the front: %s", task_id, error)
            return
        self.store.add(task_id, name, message)
        with self._kept_lock:
            self._kept.add(task_id)

    def end(self, task_id: str) -> None:
        """The job has ended."""
        with self._kept_lock:
            is_kept = task_id in self._kept
            self._kept.discard(task_id)
        if is_kept:
            self.store.remove(task_id)

    def _take_up(self, kept: KeptJob) -> None:
        try:
            if kept.num_starts >= MAX_STARTS:
                raise MessageError(f"it was begun {kept.num_starts} times, and each time the front ended before it")
            p = unpack_request(kept.message, self.app)
        except RequestError as error:
            log.error("Job %s of the last run is dropped: %s", kept.task_id, error)
            self.store.remove(kept.task_id)
            return
        log.info("Job %s of the last run is back in the queue.", kept.task_id)
        self.app.jobs.submit(kept.task_id, kept.name, lambda: process_with_scripts(p), request=p)

    # Pictures

    def process(self, p: StableDiffusionProcessing) -> Processed:
        """See modules.processing.process_images."""
        complete_request(p)
        try:
            return self._process(p)
        finally:
            keep_overrides(p, p.context)

    def _process(self, p: StableDiffusionProcessing) -> Processed:
        task_id = current_job_id.get() or ""
        state = self.app.state.of_job(task_id)
        call = f"{task_id or 'call'}-{self._run_name}-{next(self._calls)}"
        if task_id in self._kept:
            self.store.note_start(task_id)
        watch = Watch(state)
        files, sources = find_files(p)
        need = Need(checkpoint=model_key_of(files, p), networks=frozenset(file.name for file in files if file.kind == "network"))
        options = options_to_send(p.options, self.app.options.data_labels)

        def work_for(index: int, piece: Piece, first_worker: str | None) -> PieceWork:
            return PieceWork(
                make_order=lambda order_id: make_order(p, order_id, piece, model_key=need.checkpoint, options=options, files=files),
                need=need,
                num_pictures=piece.count,
                picture_work=work_of(p),
                task_id=f"{call}-{index}",
                sources=sources,
                on_progress=lambda progress: watch.note(index, progress),
                wanted_actions=watch.wanted_actions,
                on_comment=p.comment,
                first_worker=first_worker,
            )

        try:
            pieces, workers = self._share(p, need, watch)
        except Stopped:
            return finish(p, state, [])
        watch.begin([piece.num_batches for piece in pieces])
        works = [work_for(index, piece, worker) for index, (piece, worker) in enumerate(zip(pieces, workers))]
        processed = finish(p, state, list(zip(pieces, self._run_all(works))))
        watch.end()
        return processed

    def _share(self, p: StableDiffusionProcessing, need: Need, watch: Watch) -> tuple[list[Piece], list[str]]:
        """Pieces and a reserved worker for each. Raises Stopped, ClusterError."""
        watch.say("Waiting for a worker")
        first = self.dispatcher.reserve(need, lambda: bool(watch.wanted_actions()))
        watch.say(None)
        num_units = units_of(p)
        num_waiting = self.app.jobs.num_waiting + self.dispatcher.num_waiting()
        wanted = choose_num_workers(num_units=num_units, num_idle=self.dispatcher.num_idle() + 1, num_waiting=num_waiting)
        more = self.dispatcher.reserve_more(need, wanted - 1, first=first, work=work_of(p) * len(p.all_prompts))
        own = self.dispatcher.router.find(first)
        workers = [(first, own.speed if own else 1.0), *more]
        if num_units == 1:
            return [Piece(first=0, count=len(p.all_prompts), batch_size=min(p.batch_size, len(p.all_prompts)))], [first]
        pieces, used = [], []
        shares = share_pictures(batch_size=p.batch_size, num_batches=p.n_iter, speeds=[speed for _, speed in workers])
        for piece, (name, _) in zip(shares, workers):
            if piece is None:
                self.dispatcher.release(name)
                continue
            pieces.append(piece)
            used.append(name)
        return pieces, used

    def _run_all(self, works: Sequence[PieceWork]) -> list[Outcome]:
        if len(works) == 1:
            return [self._run_or_nothing(works[0])]
        with ThreadPoolExecutor(len(works), thread_name_prefix="cluster-piece") as pool:
            running = [pool.submit(copy_context().run, self._run_or_nothing, work) for work in works]
            return [outcome.result() for outcome in running]

    def _run_or_nothing(self, work: PieceWork) -> Outcome:
        try:
            return self.dispatcher.run(work)
        except Stopped:
            return Outcome(pictures=(), infotexts=())


def _describe_worker(view: WorkerView) -> dict[str, Any]:
    report = view.report
    state = "refused" if view.refused else "draining" if view.is_draining else "busy" if view.num_running else "idle"
    return {
        "worker": report.worker,
        "machine": report.machine,
        "address": report.address,
        "pid": report.pid,
        "state": state,
        "reason": view.refused or report.plan,
        "running": view.num_running,
        "checkpoint": report.checkpoint_name,
        "networks": sorted(report.networks),
        "done": report.num_done,
        "speed": view.speed,
        "busy_s": view.busy_s,
        "step_ms": report.step_ms,
        "free_disk_bytes": report.free_disk_bytes,
        "slots": [dataclasses.asdict(slot) for slot in report.slots],
    }


def work_of(p: StableDiffusionProcessing) -> float:
    """Work of one picture in megapixel steps; the second pass of hires fix is left out."""
    return p.steps * p.width * p.height / 1e6


def units_of(p: StableDiffusionProcessing) -> int:
    """Into how many equal parts a request could be split: its batches, else the pictures of its only batch.

    One if its initial pictures or prompts belong to places in a batch.
    """
    if len(p.all_prompts) != p.batch_size * p.n_iter:
        return 1
    if p.n_iter > 1:
        return p.n_iter
    return 1 if len(getattr(p, "init_images", None) or []) > 1 else p.batch_size


def complete_request(p: StableDiffusionProcessing) -> None:
    """Everything that must not depend on the worker: checked fields, seeds, prompts with styles. Raises RequestError."""
    from modules.processing.conditions import finish_prompt, setup_prompts  # these import torch
    from modules.processing.validation import fix_seed, set_all_seeds, validate_request

    validate_request(p, p.context)
    p.seed, p.subseed = (list(seed) if isinstance(seed, (list, tuple)) else seed for seed in (p.seed, p.subseed))
    fix_seed(p)
    set_folders(p)
    step_of(p, "setup_prompts", setup_prompts)()
    set_all_seeds(p)
    for name, is_negative in (("hr_prompt", False), ("hr_negative_prompt", True)):
        text = getattr(p, name, None)
        if text and isinstance(text, str):
            setattr(p, name, finish_prompt(p, text, negative=is_negative))


def finish(p: StableDiffusionProcessing, state: State, made: Sequence[tuple[Piece, Outcome]]) -> Processed:
    """Save the pictures of all pieces, in the request's order, and describe them as the job's result."""
    from modules.processing.pictures import PictureCollector  # imports torch

    class Collector(PictureCollector):
        """Infotexts come from workers; a request without any was interrupted before its first picture."""

        def infotext(self, place: int, *, use_main_prompt: bool = False) -> str:
            return self.infotexts[min(place, len(self.infotexts) - 1)] if self.infotexts else ""

    _take_facts(p, [outcome for _, outcome in made])
    collector = Collector(p, state)
    for piece, outcome in made:
        for index, (picture, text) in enumerate(zip(outcome.pictures, outcome.infotexts)):
            place = piece.first + index
            p.iteration, p.batch_index = divmod(place, p.batch_size)
            if not collector.images:
                write_params(p.context, text)
            collector.add_finished(place, picture, text, is_complete=index not in outcome.incomplete)
        p.extra_result_images += outcome.extra_pictures
    processed = collector.finish()
    log.info("%s: %d pictures from %d %s.", p.sampler_name, len(collector.infotexts), len(made), "worker" if len(made) == 1 else "workers")
    p.close()
    return processed


def _take_facts(p: StableDiffusionProcessing, outcomes: Sequence[Outcome]) -> None:
    """Fields of the request as it ran, from the first piece, and the comments of all."""
    for name, value in (outcomes[0].facts if outcomes else {}).items():
        setattr(p, name, value)
    for outcome in outcomes:
        for comment in outcome.comments:
            p.comment(comment)
