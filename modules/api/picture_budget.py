"""How many decoded pixels requests may hold: one alone, and all together. Pillow keeps a pixel of most kinds in 4 bytes.

A picture is counted from its header, before it is decoded, until its request is answered. Knows numbers, no pictures.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from modules.api.limits import MAX_HELD_PX, MAX_INPUT_PICTURES, MAX_REQUEST_PX
from modules.errors import RequestError


class TooManyPicturesError(RequestError):
    """One request brings more than a request may."""

    status = 413


class NoRoomError(RequestError):
    """The requests that are being served hold as much as they may together."""

    status = 503
    retry_after_s = 10


class PictureBudget:
    """What all requests hold. Thread-safe."""

    def __init__(self, limit_px: int = MAX_HELD_PX) -> None:
        self.limit_px = limit_px
        self.held_px = 0
        self._lock = threading.Lock()

    def take(self, num_px: int, name: str) -> None:
        """Raises NoRoomError."""
        with self._lock:
            if self.held_px + num_px > self.limit_px:
                raise NoRoomError(
                    f"{name}: the requests that are being served hold {self.held_px / 10**6:.1f} megapixels of pictures, and the limit is "
                    f"{self.limit_px / 10**6:.1f} together. Try again later, or send smaller pictures."
                )
            self.held_px += num_px

    def give_back(self, num_px: int) -> None:
        with self._lock:
            self.held_px -= num_px


class Allowance:
    """What one request holds."""

    def __init__(self, budget: PictureBudget, limit_px: int = MAX_REQUEST_PX, max_pictures: int = MAX_INPUT_PICTURES) -> None:
        self._budget, self._limit_px, self._max_pictures = budget, limit_px, max_pictures
        self._lock = threading.Lock()
        self.held_px = self.num_pictures = 0

    def take(self, num_px: int, name: str) -> None:
        """Count a picture that is about to be decoded. Raises TooManyPicturesError and NoRoomError."""
        with self._lock:
            if self.num_pictures >= self._max_pictures:
                raise TooManyPicturesError(f"{name}: a request may bring {self._max_pictures} pictures. Send the rest in another request.")
            if self.held_px + num_px > self._limit_px:
                raise TooManyPicturesError(
                    f"{name}: with it the pictures of this request have {(self.held_px + num_px) / 10**6:.1f} megapixels; the limit is "
                    f"{self._limit_px / 10**6:.1f} together. Send smaller ones, or several requests."
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
"""That of the request being served, also inside of the job it queued: jobs keep the context of who submitted them."""


@contextmanager
def allowance() -> Iterator[Allowance]:
    """An allowance for what runs inside."""
    mine = Allowance(whole_budget)
    token = current_allowance.set(mine)
    try:
        yield mine
    finally:
        current_allowance.reset(token)
        mine.close()


def take(num_px: int, name: str) -> None:
    """Count a picture for the request being served; outside of one nothing is counted."""
    mine = current_allowance.get()
    if mine is not None:
        mine.take(num_px, name)
