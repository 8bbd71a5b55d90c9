"""How work on slots ends other than well: called off, or failed on a slot that is named. Knows no network and no plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Cancelled(Exception):
    """The run was called off between two pieces of the network."""


class SlotFailure(RuntimeError):
    """Rows failed on a slot. `cause` is what the work raised there, without its frames, which would keep tensors alive."""

    def __init__(self, slot: int, cause: BaseException) -> None:
        self.slot, self.cause = slot, cause.with_traceback(None)
        super().__init__(f"slot {slot}: {type(cause).__name__}: {cause}")


def as_failure(slot: int, error: BaseException) -> BaseException:
    """What the caller hears of an error on a slot."""
    if isinstance(error, CancelledError):
        return Cancelled()
    return error if isinstance(error, (Cancelled, SlotFailure)) else SlotFailure(slot, error)


def worst_of(failures: Iterable[BaseException]) -> BaseException:
    """The one to raise: a failure before a cancellation, else the first."""
    return min(failures, key=lambda failure: isinstance(failure, Cancelled))


def blaming(slot: int, run: Callable[[], Result]) -> Result:
    """`run()`, a copy to a slot: where there is no room, it is that slot's, whoever waits for the copy. Raises: SlotFailure."""
    try:
        return run()
    except torch.OutOfMemoryError as error:
        raise SlotFailure(slot, error) from None
