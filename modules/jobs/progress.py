"""Progress of a job for the page and the API: queued, running or finished, completed share, time left, last preview.

Stores task names and results; the numbers come from a State. Makes no pictures: the worker makes previews.
"""

from __future__ import annotations

import base64
import datetime
import io
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from modules.jobs.context import required_context
from modules.jobs.state import State

FINISHED_TASKS_KEPT = 16
RESULTS_KEPT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressReport:
    """Answer to the page's progress request. `progress` 0..1, `eta` in seconds, `live_preview` a data URI."""

    active: bool
    queued: bool
    completed: bool
    progress: float | None = None
    eta: float | None = None
    live_preview: str | None = None
    id_live_preview: int | None = None
    textinfo: str | None = None


class TaskBook:
    """Pending, running and finished tasks, and the results of the last ones. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.pending: OrderedDict[str, float] = OrderedDict()
        self.running: list[str] = []
        self.finished: list[str] = []
        self.results: list[tuple[str, Any]] = []

    @property
    def current(self) -> str | None:
        """The running task, the oldest if there are several."""
        return next(iter(self.running), None)

    def add(self, task_id: str) -> None:
        with self._changed:
            self.pending[task_id] = time.time()

    def arrange(self, task_ids: Sequence[str]) -> None:
        """The pending tasks have this order from now on."""
        with self._changed:
            for task_id in task_ids:
                if task_id in self.pending:
                    self.pending.move_to_end(task_id)

    def start(self, task_id: str) -> None:
        with self._changed:
            self.running = [*self.running, task_id]
            self.pending.pop(task_id, None)

    def finish(self, task_id: str) -> None:
        with self._changed:
            self.running = [running for running in self.running if running != task_id]
            self.pending.pop(task_id, None)
            self.finished = [*self.finished, task_id][-FINISHED_TASKS_KEPT:]
            self._changed.notify_all()

    def record(self, task_id: str, result: Any) -> None:
        with self._changed:
            self.results = [*self.results, (task_id, result)][-RESULTS_KEPT:]

    def is_live(self, task_id: str) -> bool:
        return task_id in self.running or task_id in self.pending

    def wait_for_result(self, task_id: str, timeout_s: float | None = None) -> Any:
        """The recorded result of `task_id` once it has finished; None if there is none."""
        with self._changed:
            self._changed.wait_for(lambda: not self.is_live(task_id), timeout_s)
            return next((result for recorded_id, result in self.results if recorded_id == task_id), None)


def progress_share(state: State) -> float:
    """Completed share of the job, 0..1: finished parts plus the share of steps in the running part."""
    if state.job_count <= 0:
        return 0.0
    done = state.job_no / state.job_count
    if state.sampling_steps > 0:
        done += min(1.0, state.sampling_step / state.sampling_steps) / state.job_count
    return min(done, 1.0)


def seconds_left(state: State, share: float) -> float | None:
    """Estimate from the elapsed time; None before anything is done."""
    if state.time_start is None or share <= 0:
        return None
    elapsed = time.time() - state.time_start
    return max(elapsed / share - elapsed, 0.0)


def image_data_uri(image: Image.Image, image_format: str) -> str:
    """`image` as a data URI of format png, jpeg or webp."""
    buffer = io.BytesIO()
    arguments = {"compress_level": 1} if image_format == "png" and max(image.size) > 256 else {}
    image.save(buffer, format=image_format, **arguments)
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def report_task(
    tasks: TaskBook, state: State, task_id: str, *, known_preview_id: int = -1, want_preview: bool = True, image_format: str = "png"
) -> ProgressReport:
    """Status of `task_id`. Includes the preview if it is newer than `known_preview_id`."""
    active, queued, completed = task_id in tasks.running, task_id in tasks.pending, task_id in tasks.finished
    if not active:
        return ProgressReport(active=False, queued=queued, completed=completed, id_live_preview=-1, textinfo=_queue_text(tasks, task_id, queued))
    state = state.of_job(task_id)
    share = progress_share(state)
    preview_id, image = state.id_live_preview, state.current_image
    fresh = want_preview and image is not None and preview_id != known_preview_id
    return ProgressReport(
        active=True,
        queued=queued,
        completed=completed,
        progress=share,
        eta=seconds_left(state, share),
        live_preview=image_data_uri(image, image_format) if fresh and image is not None else None,
        id_live_preview=preview_id if fresh else known_preview_id,
        textinfo=state.textinfo,
    )


def _queue_text(tasks: TaskBook, task_id: str, queued: bool) -> str:
    if not queued:
        return "Waiting..."
    waiting = list(tasks.pending)
    return f"In queue: {waiting.index(task_id) + 1}/{len(waiting)}" if task_id in waiting else "Waiting..."


def overall_progress(state: State) -> dict[str, Any]:
    """Fields `progress`, `eta_relative`, `state` and `textinfo` of GET /sdapi/v1/progress."""
    if state.job_count == 0:
        return {"progress": 0.0, "eta_relative": 0.0, "state": state.dict(), "textinfo": state.textinfo}
    share = max(progress_share(state), 0.01)
    return {"progress": share, "eta_relative": seconds_left(state, share) or 0.0, "state": state.dict(), "textinfo": state.textinfo}


def create_task_id(task_type: str) -> str:
    """A task id for a request without one. It is unguessable, because knowing a task's id gives access to its previews."""
    return f"task({task_type}-{datetime.datetime.now().strftime('%Y%m%d%H%M%S%f')}-{secrets.token_hex(8)})"


# Names that extensions call; they use the installed application's TaskBook.


def _book() -> TaskBook:
    return required_context().jobs.tasks


def add_task_to_queue(id_job: str) -> None:
    _book().add(id_job)


def start_task(id_task: str) -> None:
    _book().start(id_task)


def finish_task(id_task: str) -> None:
    _book().finish(id_task)


def record_results(id_task: str, res: Any) -> None:
    _book().record(id_task, res)


def __getattr__(name: str) -> Any:
    """`current_task`, `pending_tasks`, `finished_tasks` and `recorded_results` of the installed application."""
    fields = {"current_task": "current", "pending_tasks": "pending", "finished_tasks": "finished", "recorded_results": "results"}
    if name not in fields:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_book(), fields[name])
