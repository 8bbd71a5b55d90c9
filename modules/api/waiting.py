"""Waits for a job without a thread, and drops the job if its client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from modules.errors import RequestError

if TYPE_CHECKING:
    from fastapi import Request

    from modules.jobs.queue import Job, JobQueue

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

current_request: ContextVar[Request | None] = ContextVar("current_request", default=None)
"""The request being handled; set by modules.api.routes."""


class ClientGoneError(RequestError):
    """The client no longer waits for the answer. The status is only for the log."""

    status = 499


async def wait_for_job(job: Job[ResultT], *, drop_from: JobQueue | None = None) -> ResultT:
    """The job's result. `drop_from`: the queue to remove the job from (or interrupt it in) if the client disconnects first.

    Raises what the job raises, and ClientGoneError.
    """
    loop = asyncio.get_running_loop()
    over = asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the server is gone, and so is whoever waited
            loop.call_soon_threadsafe(over.set)

    job.add_done_callback(wake)
    request = current_request.get()
    if drop_from is None or request is None:
        await over.wait()
    elif not await _is_over_before_the_client_goes(over, request):
        drop_from.abandon(job)
        raise ClientGoneError(f"the client of {job.task_id} disconnected; its results were not to be saved, so it was dropped.")
    return job.wait(0)


async def _is_over_before_the_client_goes(over: asyncio.Event, request: Request) -> bool:
    waits = [asyncio.ensure_future(over.wait()), asyncio.ensure_future(_wait_until_gone(request))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        return over.is_set()
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
