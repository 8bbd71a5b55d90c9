"""Recovers when a device runs out of memory during work: applies remedies, the mildest first, and repeats the work after each.

Knows no models: a remedy is a function that frees something and says what.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from backend.memory.errors import OutOfMemory

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Remedy = Callable[[], str]
"""Frees memory and says in a few words what it did; "" if there was nothing to do."""

_SIGNS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "UR_RESULT_ERROR_OUT_OF",
    "can't allocate memory",
    "not enough memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device is out of memory: torch's class, ours, or a known message of an underlying library."""
    if isinstance(error, (torch.OutOfMemoryError, OutOfMemory)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def run_with_remedies(run: Callable[[], Result], remedies: Iterable[Remedy], what: str) -> Result:
    """`run()`. If it runs out of memory, repeats it after each remedy that did something. `run` must be repeatable.

    Raises: what `run` raises, if it is something else or no remedy is left.
    """
    result, error = _attempt(run)
    for remedy in remedies:
        if error is None:
            break
        done = remedy()
        if done:
            logger.warning("Out of memory during %s: %s; trying again.", what, done)
            result, error = _attempt(run)
    if error is not None:
        raise error
    assert result is not None
    return result[0]


def _attempt(run: Callable[[], Result]) -> tuple[tuple[Result] | None, BaseException | None]:
    """The result, or the out-of-memory error without its traceback, which would keep the failed attempt's tensors alive."""
    try:
        return (run(),), None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None, error.with_traceback(None)
