"""State of the running job: counters, interrupt flags, the last preview. Written by the worker, read by page and API; knows neither.

Names are those that extensions use (`shared.state`). Previews come from a `preview_maker` that the job sets.
"""

from __future__ import annotations

import datetime
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

log = logging.getLogger(__name__)

PreviewMaker = Callable[[Any], Image.Image | None]
StateFields = dict[str, Any]


class State:
    """Progress of one job. Any thread may set flags; everything else belongs to the worker."""

    def __init__(self) -> None:
        self.skipped = False
        self.interrupted = False
        self.stopping_generation = False
        self.job = ""
        self.job_no = 0
        self.job_count = 0
        self.processing_has_refined_job_count = False
        self.job_timestamp = "0"
        self.sampling_step = 0
        self.sampling_steps = 0
        self.current_latent: Any = None
        self.current_image: Image.Image | None = None
        self.current_image_sampling_step = 0
        self.id_live_preview = 0
        self.textinfo: str | None = None
        self.time_start: float | None = None
        self.server_start: float | None = time.time()
        self.need_restart = False
        self.preview_maker: PreviewMaker | None = None
        self._preview_lock = threading.Lock()
        self._server_command: str | None = None
        self._server_command_changed = threading.Condition()

    # One job at a time has one state. modules.jobs.states has a state per job, for a cluster's front.

    def of_job(self, task_id: str) -> State:
        """The state of the job `task_id`."""
        return self

    @contextmanager
    def of_thread(self, task_id: str) -> Iterator[None]:
        """Inside, the calling thread works on the job `task_id`."""
        yield

    def drop(self, task_id: str) -> None:
        """The job `task_id` has ended; its state is not asked for again."""

    @property
    def server_command(self) -> str | None:
        """The pending server command: "stop", "restart", "kill" or None."""
        return self._server_command

    @server_command.setter
    def server_command(self, value: str | None) -> None:
        with self._server_command_changed:
            self._server_command = value
            self._server_command_changed.notify_all()

    def wait_for_server_command(self, timeout: float | None = None) -> str | None:
        """Block until there is a command (or `timeout` seconds pass), then take and return it."""
        with self._server_command_changed:
            self._server_command_changed.wait_for(lambda: self._server_command is not None, timeout)
            command, self._server_command = self._server_command, None
            return command

    def request_restart(self) -> None:
        """End the running job and restart the server."""
        self.interrupt()
        self.server_command = "restart"

    def skip(self) -> None:
        """End the running batch within one step; the next batch continues."""
        self.skipped = True
        log.info("Skip requested.")

    def interrupt(self) -> None:
        """End the running job within one step; finished pictures are kept."""
        self.interrupted = True
        log.info("Interrupt requested.")

    def stop_generating(self) -> None:
        """End the running job after the current batch."""
        self.stopping_generation = True
        log.info("Stop after the current batch requested.")

    def nextjob(self) -> None:
        """Part of the job (a batch, a pass) is done: advance the counter. Shows a preview unless the job's maker shows steps instead."""
        if getattr(self.preview_maker, "shows_parts", True):
            self.do_set_current_image()
        self.job_no += 1
        self.sampling_step = 0
        self.current_image_sampling_step = 0

    def begin(self, job: str = "(unknown)") -> None:
        """A job starts: reset everything."""
        self.sampling_step = 0
        self.sampling_steps = 0
        self.time_start = time.time()
        self.job_count = -1
        self.processing_has_refined_job_count = False
        self.job_no = 0
        self.job_timestamp = datetime.datetime.now().strftime("%Y%m%d%H%M%S")
        self.current_latent = None
        self.current_image = None
        self.current_image_sampling_step = 0
        self.skipped = False
        self.interrupted = False
        self.stopping_generation = False
        self.textinfo = None
        self.preview_maker = None
        self.job = job

    def end(self) -> None:
        """The job has ended, successfully or not."""
        self.job = ""
        self.job_count = 0
        self.current_latent = None
        self.preview_maker = None

    def set_current_image(self) -> None:
        """Show the current latent if enough steps have passed since the last preview."""
        if self.sampling_step - self.current_image_sampling_step >= 1:
            self.do_set_current_image()

    def do_set_current_image(self) -> None:
        """Show the current latent now, using the job's preview maker. Worker thread only."""
        maker, latent = self.preview_maker, self.current_latent
        if maker is None or latent is None:
            return
        image = maker(latent)
        if image is not None:
            self.assign_current_image(image)
            self.current_image_sampling_step = self.sampling_step

    def assign_current_image(self, image: Image.Image) -> None:
        """Show `image` as the preview."""
        with self._preview_lock:
            self.current_image = image
            self.id_live_preview += 1

    def assign_preview(self, image: Image.Image, *, maker: PreviewMaker, preview_id: int, step: int) -> None:
        """Show a preview that was made beside the job, unless the job has ended or has shown something since `preview_id`. Any thread."""
        with self._preview_lock:
            if self.preview_maker is maker and self.id_live_preview == preview_id:
                self.current_image = image
                self.id_live_preview += 1
                self.current_image_sampling_step = step

    def dict(self) -> StateFields:
        """The part of the state reported by the API."""
        return {
            "skipped": self.skipped,
            "interrupted": self.interrupted,
            "stopping_generation": self.stopping_generation,
            "job": self.job,
            "job_count": self.job_count,
            "job_timestamp": self.job_timestamp,
            "job_no": self.job_no,
            "sampling_step": self.sampling_step,
            "sampling_steps": self.sampling_steps,
        }
