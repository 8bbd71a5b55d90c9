"""The wall around extension code: what it raises is logged and goes no further, and gradio's compatibility layer knows when a guest calls.

Must not know scripts, callbacks or the page.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from modules import errors

_guest_is_calling: ContextVar[bool] = ContextVar("guest_is_calling", default=False)


def guest_is_calling() -> bool:
    """Whether this thread (or task) is running extension code called by the host."""
    return _guest_is_calling.get()


@contextlib.contextmanager
def as_guest() -> Iterator[None]:
    """Marks the body as extension code."""
    token = _guest_is_calling.set(True)
    try:
        yield
    finally:
        _guest_is_calling.reset(token)


@contextlib.contextmanager
def as_host() -> Iterator[None]:
    """Inside guest code: marks the body as this program's own code again."""
    token = _guest_is_calling.set(False)
    try:
        yield
    finally:
        _guest_is_calling.reset(token)


def call_guest(code: Callable[[], Any], task: str, *, passing: tuple[type[Exception], ...] = ()) -> tuple[bool, Any]:
    """(whether `code` succeeded, its result). A failure is logged with `task`, which says what failed and what happens next.

    Raises: exceptions listed in `passing`.
    """
    results: list[Any] = [None]

    def call() -> None:
        with as_guest():
            results.append(code())

    return errors.run(call, task, passing=passing), results[-1]


def end_of_path(path: str | None) -> str:
    """A file path as the user knows it: `extension/scripts/file.py`."""
    parts = (path or "?").replace("\\", "/").split("/")
    return "/".join(parts[-3:])
