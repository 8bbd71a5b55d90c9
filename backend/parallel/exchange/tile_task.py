"""Drives one tile's generator on its slot's worker, piece by piece between exchanges, so that the worker is free while the tile waits.

    worker of slot 0: tile 0 .. waits |  another batch's tile 0    | tile 0 resumed ..
    worker of slot 1:    tile 1 ........ posts its sums -> resumes tile 0 ..

Knows no network and no plan.
"""

from __future__ import annotations

import contextvars
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from backend.nn.tiles import Awaited, Received
from backend.parallel.exchange.meeting import Meeting, ReleasedError

Result = TypeVar("Result")


class Submit(Protocol):
    """Gives a function to a slot's worker thread."""

    def __call__(self, function: Callable[[], None], /) -> Future[None]: ...


class Later(Protocol):
    """Something other than tiles that a tile may wait for, such as a ControlNet's residuals."""

    def when_ready(self, then: Callable[[], None]) -> None:
        """Call `then()` once, possibly at once."""
        ...


TileWork = Generator[Awaited | Later, Received | None, Result]


@dataclass(slots=True, eq=False)
class TileTask(Generic[Result]):
    """One tile's work on its worker. `work` yields `Awaited` of the meeting, or anything `Later`.

    `result` is set when nothing of the tile runs or waits any more. Runs in the context and the inference mode of the thread that made it.
    """

    work: TileWork[Result]
    submit: Submit
    meeting: Meeting
    rank: int
    result: Future[Result] = field(default_factory=Future)
    _awaited: Awaited | None = None
    _outcome: tuple[Result] | None = None
    _context: contextvars.Context = field(default_factory=contextvars.copy_context)
    _is_inference: bool = field(default_factory=torch.is_inference_mode_enabled)

    def start(self) -> None:
        self._submit()

    def _submit(self) -> None:
        try:
            future = self.submit(self._run)
        except RuntimeError as error:  # the slot is lost, or its worker closed
            self._end(error)
            return
        future.add_done_callback(self._check)

    def _run(self) -> None:
        with torch.inference_mode() if self._is_inference else torch.no_grad():
            self._context.run(self._advance)

    def _advance(self) -> None:
        """Run until the tile has to wait or is done. What it raises goes through the worker, which looks whether its device is dead."""
        self.meeting.raise_if_cancelled(self.rank)
        received: Received | None = None
        while True:
            if self._awaited is not None:
                received = self.meeting.take_or_wait(self.rank, self._awaited, self._submit)
                if received is None:
                    return
                self._awaited = None
            try:
                waits_for = self.work.send(received)
            except StopIteration as stop:
                self._outcome = (stop.value,)
                return
            received = None
            if not isinstance(waits_for, Awaited):
                waits_for.when_ready(self._submit)
                return
            self._awaited = waits_for

    def _check(self, done: Future[None]) -> None:
        """After each run. The result is set here, when no frame of the tile holds tensors any more."""
        if done.cancelled():
            self._end(CancelledError("A tile was cancelled before it started."))
        elif (error := done.exception()) is not None:
            self._end(error)
            return
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            with suppress(InvalidStateError):  # the check of an earlier run may come late, on another thread
                self.result.set_result(outcome[0])

    def _end(self, error: BaseException) -> None:
        """Free the tile's tensors, end the other tiles' waits, and pass the error on. The generator does not run at this point."""
        traceback.clear_frames(error.__traceback__)
        self.work.close()
        self._awaited = None
        self.meeting.cancel()
        with suppress(InvalidStateError):
            self.result.set_exception(error)


def finish_all(tasks: Sequence[TileTask[Result]]) -> list[Result]:
    """Start all tiles and wait until none runs or waits any more. Returns their results in order. Not for a worker's thread.

    Raises: the first error that is not a consequence of another. A device's error comes last: both ends of a failed copy have one, and a worker
    that found its slot lost says more.
    """
    futures: list[Future[Any]] = []
    try:
        for task in tasks:
            task.start()
            futures.append(task.result)
        wait(futures)
        tasks[0].meeting.wait_for_copies()
        cause = find_cause(futures)
        if cause is not None:
            raise cause
        return [future.result() for future in futures]
    except BaseException:
        tasks[0].meeting.cancel()
        wait(futures)
        raise
    finally:
        futures.clear()  # otherwise the error's traceback and this frame keep each other alive
        cause = None


def find_cause(futures: Sequence[Future[Any]]) -> BaseException | None:
    """The error to report for tiles that have all ended; None if none failed."""
    errors = [found for future in futures if (found := future.exception()) is not None]
    causes = sorted((error for error in errors if not isinstance(error, ReleasedError)), key=lambda error: isinstance(error, torch.AcceleratorError))
    return next(iter([*causes, *errors]), None)
