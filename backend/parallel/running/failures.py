"""How work on slots can fail: cancelled, or failed on a named slot. Knows no network and no plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Cancelled(Exception):
    """The run was cancelled between two pieces of the network."""


class SlotFailure(RuntimeError):
    """Rows failed on a slot. `cause` is what the work raised there, without its traceback, which would keep tensors alive."""

    def __init__(self, slot: int, cause: BaseException) -> None:
        self.slot, self.cause = slot, cause.with_traceback(None)
        super().__init__(f"slot {slot}: {type(cause).__name__}: {cause}")


def as_failure(slot: int, error: BaseException) -> BaseException:
    """The exception to report for an error on a slot."""
    if isinstance(error, CancelledError):
        return Cancelled()
    return error if isinstance(error, (Cancelled, SlotFailure)) else SlotFailure(slot, error)


def worst_of(failures: Iterable[BaseException]) -> BaseException:
    """The exception to raise: the first failure; a cancellation only if there is no failure."""
    return min(failures, key=lambda failure: isinstance(failure, Cancelled))


def blaming(slot: int, run: Callable[[], Result]) -> Result:
    """`run()`, a copy to a slot. If it runs out of memory, blames that slot, no matter who waits for the copy. Raises: SlotFailure."""
    try:
        return run()
    except torch.OutOfMemoryError as error:
        raise SlotFailure(slot, error) from None
