"""The wall around code of extensions: what it raises is reported and goes no further, and gradio's compatibility layer knows that a guest calls.

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
    """Whether this thread (or task) is in code of an extension that the host called."""
    return _guest_is_calling.get()


@contextlib.contextmanager
def as_guest() -> Iterator[None]:
    """What runs inside is code of an extension."""
    token = _guest_is_calling.set(True)
    try:
        yield
    finally:
        _guest_is_calling.reset(token)


@contextlib.contextmanager
def as_host() -> Iterator[None]:
    """Inside of guest code: what runs here is this program's again."""
    token = _guest_is_calling.set(False)
    try:
        yield
    finally:
        _guest_is_calling.reset(token)


def call_guest(code: Callable[[], Any], task: str, *, passing: tuple[type[Exception], ...] = ()) -> tuple[bool, Any]:
    """(whether `code` went well, its result). A failure is logged with `task`, which says who failed where and what happens next.

    Raises: what `passing` names.
    """
    results: list[Any] = [None]

    def call() -> None:
        with as_guest():
            results.append(code())

    return errors.run(call, task, passing=passing), results[-1]


def end_of_path(path: str | None) -> str:
    """A file as the user knows it: `extension/scripts/file.py`."""
    parts = (path or "?").replace("\\", "/").split("/")
    return "/".join(parts[-3:])
