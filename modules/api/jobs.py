"""Routes for the running job: its progress, and ending it. They use the same state as the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modules.api import models
from modules.api.pictures import encode_picture, encode_settings
from modules.api.pools import previews, run_in
from modules.jobs.progress import overall_progress, report_task

if TYPE_CHECKING:
    from modules.application import Application
    from modules.jobs.state import State

_PREVIEW_FORMATS = ("png", "jpeg", "webp")


class JobRoutes:
    """One method per route."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def progress(self, skip_current_image: bool = False) -> models.ProgressResponse:
        """Progress of the running job, with its preview unless `skip_current_image`. 0 if there is no job."""
        state, options = self.app.state, self.app.options
        config = self.app.config
        is_private = bool(config.gradio_auth) and not config.api_auth  # the page has a password, but this route does not
        image = None if skip_current_image or is_private or state.job_count == 0 else state.current_image
        current = None
        if image is not None:
            settings = encode_settings(options)
            current = await run_in(previews(), encode_picture, image, extension=options.samples_format, infotext=None, settings=settings)
        return models.ProgressResponse(**overall_progress(state), current_image=current)

    async def interrupt(self, id_task: str = "") -> dict[str, Any]:
        """End the running job within one step; finished pictures are returned and saved. On a cluster `id_task` names one of several."""
        if not (id_task and self.app.jobs.cancel(id_task)):
            self._state(id_task).interrupt()
        return {}

    async def skip(self, id_task: str = "") -> None:
        """End the running batch within one step."""
        self._state(id_task).skip()

    def _state(self, task_id: str) -> State:
        return self.app.state.of_job(task_id) if task_id else self.app.state

    async def task_progress(self, body: models.TaskProgressRequest) -> models.TaskProgressResponse:
        """Progress of one task, for the page."""
        options = self.app.options
        image_format = options.live_previews_image_format if options.live_previews_image_format in _PREVIEW_FORMATS else _PREVIEW_FORMATS[0]
        report = await run_in(
            previews(),
            report_task,
            self.app.jobs.tasks,
            self.app.state,
            body.id_task or "",
            known_preview_id=body.id_live_preview,
            want_preview=body.live_preview and bool(options.live_previews_enable),
            image_format=image_format,
        )
        return models.TaskProgressResponse.model_validate(report, from_attributes=True)

    async def pending_tasks(self) -> models.PendingTasksResponse:
        """How many tasks wait, and their ids. Behind the page's login the ids are left out: one gives access to its user's previews."""
        tasks = list(self.app.jobs.tasks.pending)
        return models.PendingTasksResponse(size=len(tasks), tasks=[] if self.app.config.gradio_auth else tasks)
