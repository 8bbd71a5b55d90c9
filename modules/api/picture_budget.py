"""Limits the decoded pixels of requests: per request, and in total. Pillow uses 4 bytes per pixel for most formats.

A picture is counted from its header, before decoding, until its request is answered. Works with numbers, not pictures.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from modules.api.limits import MAX_HELD_PX, MAX_INPUT_PICTURES, MAX_REQUEST_PX
from modules.errors import RequestError


class TooManyPicturesError(RequestError):
    """A request contains more pictures or pixels than allowed."""

    status = 413


class NoRoomError(RequestError):
    """The requests being handled already hold the maximum in total."""

    status = 503
    retry_after_s = 10


class PictureBudget:
    """Pixels held by all requests. Thread-safe."""

    def __init__(self, limit_px: int = MAX_HELD_PX) -> None:
        self.limit_px = limit_px
        self.held_px = 0
        self._lock = threading.Lock()

    def take(self, num_px: int, name: str) -> None:
        """Raises NoRoomError."""
        with self._lock:
            if self.held_px + num_px > self.limit_px:
                raise NoRoomError(
                    f"{name}: requests in progress hold {self.held_px / 10**6:.1f} megapixels of pictures; the limit is "
                    f"{self.limit_px / 10**6:.1f} in total. Try again later, or send smaller pictures."
                )
            self.held_px += num_px

    def give_back(self, num_px: int) -> None:
        with self._lock:
            self.held_px -= num_px


class Allowance:
    """Pixels held by one request."""

    def __init__(self, budget: PictureBudget, limit_px: int = MAX_REQUEST_PX, max_pictures: int = MAX_INPUT_PICTURES) -> None:
        self._budget, self._limit_px, self._max_pictures = budget, limit_px, max_pictures
        self._lock = threading.Lock()
        self.held_px = self.num_pictures = 0

    def take(self, num_px: int, name: str) -> None:
        """Count a picture before it is decoded. Raises TooManyPicturesError and NoRoomError."""
        with self._lock:
            if self.num_pictures >= self._max_pictures:
                raise TooManyPicturesError(f"{name}: a request may contain {self._max_pictures} pictures. Send the rest in another request.")
            if self.held_px + num_px > self._limit_px:
                raise TooManyPicturesError(
                    f"{name}: with this one, the request's pictures have {(self.held_px + num_px) / 10**6:.1f} megapixels; the limit is "
                    f"{self._limit_px / 10**6:.1f} in total. Send smaller pictures or several requests."
                )
            self._budget.take(num_px, name)
            self.held_px += num_px
            self.num_pictures += 1

    def close(self) -> None:
        with self._lock:
            self._budget.give_back(self.held_px)
            self.held_px = 0


whole_budget = PictureBudget()
current_allowance: ContextVar[Allowance | None] = ContextVar("current_allowance", default=None)
"""The current request's allowance, also visible in the job it queued, because jobs keep their submitter's context."""


@contextmanager
def allowance() -> Iterator[Allowance]:
    """An allowance for the body of the `with` block."""
    mine = Allowance(whole_budget)
    token = current_allowance.set(mine)
    try:
        yield mine
    finally:
        current_allowance.reset(token)
        mine.close()


def take(num_px: int, name: str) -> None:
    """Count a picture against the current request; outside a request nothing is counted."""
    mine = current_allowance.get()
    if mine is not None:
        mine.take(num_px, name)
