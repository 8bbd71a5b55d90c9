"""What the page and the API are told about a job: waiting, running or finished, how far, how long still, and its last preview.

Keeps task names and results; the numbers come from a State. Makes no pictures: previews are made by the worker.
"""

from __future__ import annotations

import base64
import datetime
import io
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from PIL import Image

from modules.jobs.context import required_context
from modules.jobs.state import State

FINISHED_TASKS_KEPT = 16
RESULTS_KEPT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressReport:
    """Answer to a progress request of the page. `progress` 0..1, `eta` in seconds, `live_preview` a data URI."""

    active: bool
    queued: bool
    completed: bool
    progress: float | None = None
    eta: float | None = None
    live_preview: str | None = None
    id_live_preview: int | None = None
    textinfo: str | None = None


class TaskBook:
    """Which tasks wait, which one runs, which are over, and the results of the last ones. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.pending: OrderedDict[str, float] = OrderedDict()
        self.current: str | None = None
        self.finished: list[str] = []
        self.results: list[tuple[str, Any]] = []

    def add(self, task_id: str) -> None:
        with self._changed:
            self.pending[task_id] = time.time()

    def start(self, task_id: str) -> None:
        with self._changed:
            self.current = task_id
            self.pending.pop(task_id, None)

    def finish(self, task_id: str) -> None:
        with self._changed:
            if self.current == task_id:
                self.current = None
            self.pending.pop(task_id, None)
            self.finished = [*self.finished, task_id][-FINISHED_TASKS_KEPT:]
            self._changed.notify_all()

    def record(self, task_id: str, result: Any) -> None:
        with self._changed:
            self.results = [*self.results, (task_id, result)][-RESULTS_KEPT:]

    def is_live(self, task_id: str) -> bool:
        return task_id == self.current or task_id in self.pending

    def wait_for_result(self, task_id: str, timeout_s: float | None = None) -> Any:
        """The recorded result of `task_id`, once it is over; None if there is none."""
        with self._changed:
            self._changed.wait_for(lambda: not self.is_live(task_id), timeout_s)
            return next((result for recorded_id, result in self.results if recorded_id == task_id), None)


def progress_share(state: State) -> float:
    """How much of the job is done, 0..1: parts done and the share of steps of the running part."""
    if state.job_count <= 0:
        return 0.0
    done = state.job_no / state.job_count
    if state.sampling_steps > 0:
        done += min(1.0, state.sampling_step / state.sampling_steps) / state.job_count
    return min(done, 1.0)


def seconds_left(state: State, share: float) -> float | None:
    """Estimate from the time used so far; None before anything is done."""
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
    """How `task_id` stands. The preview comes along when it is newer than `known_preview_id`."""
    active, queued, completed = task_id == tasks.current, task_id in tasks.pending, task_id in tasks.finished
    if not active:
        return ProgressReport(active=False, queued=queued, completed=completed, id_live_preview=-1, textinfo=_queue_text(tasks, task_id, queued))
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
    """A task id for a request that brought none. Nobody can guess it: who knows a task's id may see its previews."""
    return f"task({task_type}-{datetime.datetime.now().strftime('%Y%m%d%H%M%S%f')}-{secrets.token_hex(8)})"


# The names that extensions call; they speak to the installed application's book.


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
