"""Errors that the application answers with, and the reporting helpers that extensions call.

A `RequestError` is the caller's mistake: its message is shown unchanged, and the API answers with its `status`.
Must not know models, HTTP or the page.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

MAX_EXCEPTION_RECORDS = 5

exception_records: list[dict[str, Any]] = []
_shown_once: set[str] = set()
_records_lock = threading.Lock()


class RequestError(Exception):
    """The request cannot be served as it is. `status` is the HTTP status with the reason (422: a field's value)."""

    status = 422
    retry_after_s: int | None = None


class OptionError(RequestError, ValueError):
    """A setting got an invalid value, or may not be changed."""


class NoCheckpointError(RequestError):
    """There is no model file. Not a 404, because clients read that as a disabled API."""

    status = 409


class UnknownCheckpointError(RequestError):
    """The requested checkpoint does not exist."""


class UnknownSamplerError(RequestError):
    """The requested sampler or schedule does not exist."""


class JobCancelled(RequestError):
    """The job was removed from the queue before it started."""

    status = 409


class QueueFullError(RequestError):
    """The queue is full."""

    status = 503
    retry_after_s = 10


class ServerClosingError(JobCancelled):
    """The server is shutting down: it accepts no jobs and drops waiting ones."""

    status = 503
    retry_after_s = 30


def format_exception(error: BaseException, traceback_: Any) -> list[list[str]]:
    """[[place, source line], ...] of the traceback, innermost last."""
    return [[f"{frame.filename}, line {frame.lineno}, {frame.name}", frame.line or ""] for frame in traceback.extract_tb(traceback_)]


def get_exceptions() -> list[dict[str, Any]]:
    """The last recorded exceptions, newest first."""
    with _records_lock:
        return list(reversed(exception_records))


def record_exception(error: BaseException | None = None) -> None:
    """Remember an exception, by default the one being handled, for the system report."""
    error = sys.exc_info()[1] if error is None else error
    if error is None:
        return
    with _records_lock:
        if exception_records and exception_records[-1]["exception"] == str(error):
            return
        exception_records.append({"exception": str(error), "traceback": format_exception(error, error.__traceback__)})
        del exception_records[:-MAX_EXCEPTION_RECORDS]


def report(message: str, *, exc_info: bool = False) -> None:
    """Log an error, with the traceback of the exception being handled if `exc_info` is true."""
    record_exception()
    log.error("%s", message, exc_info=exc_info)


def display(error: BaseException, task: str, *, full_traceback: bool = False) -> None:
    """Log `error`, which occurred during `task`."""
    record_exception()
    log.error("%s: %s: %s", task or "error", type(error).__name__, error, exc_info=error)


def display_once(error: BaseException, task: str) -> None:
    """Log `error` the first time `task` fails."""
    if task in _shown_once:
        return
    _shown_once.add(task)
    display(error, task)


def print_error_explanation(message: str) -> None:
    """Log an explanation for the user."""
    log.error("%s", message)


def run(code: Callable[[], object], task: str, *, passing: tuple[type[Exception], ...] = ()) -> bool:
    """Call an extension's `code`; a failure is reported, not raised. Whether it went well. Raises: what `passing` names."""
    try:
        code()
    except passing:
        raise
    except Exception as error:  # noqa: BLE001 - wall: code of extensions
        display(error, task)
        return False
    return True
