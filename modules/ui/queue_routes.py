"""What the Queue tab asks the server: the jobs, and moving, ending and repeating one. Who may ask is decided before (modules/http_edge/access.py,
as for the page).

Behind a login, prompts are shown and jobs touched only by who knows their task ids: a browser knows those that it has started.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Query

from modules.errors import RequestError
from modules.jobs.progress import progress_share, seconds_left
from modules.ui.said_errors import saying_errors

if TYPE_CHECKING:
    from modules.application import Application
    from modules.jobs.queue import JobLine

PREFIX = "/webui_queue"
OWN_MAX = 64
_TASK_ID = re.compile(r"task\([A-Za-z0-9-]{1,60}\)")
Own = Annotated[list[Annotated[str, Query(max_length=80)]], Query(max_length=OWN_MAX)]
Number = Annotated[int, Query(ge=0, le=2**31)]


class QueueRoutes:
    """One method per route."""

    def __init__(self, app: Application) -> None:
        self.app = app

    def _is_own(self, line: JobLine, own: list[str]) -> bool:
        return not self.app.config.gradio_auth or line.task_id in own

    def jobs(self, own: Own = []) -> dict[str, Any]:  # noqa: B006 - FastAPI copies it
        """Every job, the running ones with their progress."""
        lines = []
        for line in self.app.jobs.lines():
            is_own = self._is_own(line, own)
            state = self.app.state.of_job(line.task_id)
            share = progress_share(state) if line.state == "running" else 0.0
            running = {"progress": share, "eta": seconds_left(state, share)} if line.state == "running" else {}
            lines.append(
                {
                    "number": line.number,
                    "tab": line.name,
                    "label": line.label if is_own else "",
                    "state": line.state,
                    "seconds": line.seconds,
                    "error": line.error if is_own else "",
                    "own": is_own,
                    "can_repeat": is_own and line.can_repeat,
                    **running,
                }
            )
        return {"jobs": lines}

    def _check(self, number: int, own: list[str]) -> None:
        line = next((line for line in self.app.jobs.lines() if line.number == number), None)
        if line is None or not self._is_own(line, own):
            raise RequestError(f"job {number} is not in the queue any more, or it is somebody else's.")

    def move(self, number: Number, places: Annotated[int, Query(ge=-1000, le=1000)], own: Own = []) -> dict[str, Any]:  # noqa: B006
        self._check(number, own)
        if not self.app.jobs.move(number, places):
            raise RequestError(f"job {number} does not wait any more.")
        return {}

    def end(self, number: Number, own: Own = []) -> dict[str, Any]:  # noqa: B006
        """Cancel a waiting job, interrupt a running one."""
        self._check(number, own)
        if not self.app.jobs.end(number):
            raise RequestError(f"job {number} has ended already.")
        return {}

    def repeat(self, number: Number, task_id: Annotated[str, Query(max_length=80)], own: Own = []) -> dict[str, Any]:  # noqa: B006
        """Queue a job again under a new task id."""
        self._check(number, own)
        if not _TASK_ID.fullmatch(task_id):
            raise RequestError("a task id looks like task(abc123).")
        job = self.app.jobs.repeat(number, task_id)
        return {"number": job.number, "tab": job.name}


def add_routes(app: Application, fastapi_app: FastAPI) -> None:
    """Add the routes to the server."""
    routes = QueueRoutes(app)
    fastapi_app.add_api_route(f"{PREFIX}/jobs", routes.jobs, methods=["GET"], include_in_schema=False)
    for action in ("move", "end", "repeat"):
        fastapi_app.add_api_route(
            f"{PREFIX}/{action}", saying_errors(getattr(routes, action)), methods=["POST"], include_in_schema=False, response_model=None
        )
