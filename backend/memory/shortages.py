"""Work that may run out of memory: recovers with the store's remedies, and otherwise says what was being done and what is on every device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from backend.devices.slot import canonical_device
from backend.memory import recovery
from backend.memory.current import current_store
from backend.memory.errors import OutOfMemory
from backend.memory.residents import LoadedModel

Result = TypeVar("Result")
_DEVICE_NAMES = re.compile(r"\b(vgpu|cuda|xpu|mps):(\d+)|\bGPU (\d+)")


def out_of_memory(what: str, device: torch.device | str | None = None, need_bytes: int | None = None) -> OutOfMemory:
    """The error to raise when `what` runs out of memory, with the table of all devices."""
    return current_store().out_of_memory(what, _device(device), need_bytes)


def run_with_recovery(
    run: Callable[[], Result], *, what: str, device: torch.device | str | None = None, keep: Iterable[object] | None = None
) -> Result:
    """`run()`. If `device` runs out of memory, repeats it after releasing idle memory, after evicting all but `keep`, and while streaming `keep`.

    `keep`: the patchers that `run` uses, by default those loaded last. `run` must be repeatable with the same result.
    Raises: OutOfMemory with the table.
    """
    store = current_store()
    device = _device(device)
    try:
        return recovery.run_with_remedies(run, store.remedies(device, None if keep is None else entries_of(keep)), what)
    except RuntimeError as error:
        if isinstance(error, OutOfMemory) or not recovery.is_out_of_memory(error):
            raise
        raise store.out_of_memory(what, device, None) from error


@contextmanager
def explaining_shortages(what: str) -> Iterator[None]:
    """Turns an out-of-memory error from inside into OutOfMemory, with `what` was being done and the models on every device. Raises: OutOfMemory."""
    try:
        yield
    except RuntimeError as error:
        told = explain_shortage(error, what)
        if told is error:
            raise
        raise told from error.with_traceback(None)


def explain_shortage(error: Exception, what: str) -> Exception:
    """OutOfMemory with the table of all devices for an out-of-memory error that is not one already; any other error unchanged."""
    if isinstance(error, OutOfMemory) or not recovery.is_out_of_memory(error):
        return error
    return current_store().out_of_memory(what, _device_in(error), None)


def _device_in(error: BaseException) -> torch.device:
    """The first device that an error's message names; the primary one if it names none."""
    named = _DEVICE_NAMES.search(str(error))
    if named is None:
        return current_store().primary.torch_device
    return torch.device(named[1], int(named[2])) if named[1] else torch.device("cuda", int(named[3]))


def entries_of(models: Iterable[object]) -> list[LoadedModel]:
    """The residents for `models`, which may be patchers, their clones, or residents."""
    held = list(models)
    modules = {id(getattr(model, "model", None)) for model in held}
    return [entry for entry in current_store().residents if entry in held or id(entry.real_model) in modules]


def _device(device: torch.device | str | None) -> torch.device:
    """The device; the primary one for None."""
    return current_store().primary.torch_device if device is None else canonical_device(device)
