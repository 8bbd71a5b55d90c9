"""Events outside of a job's hooks that extensions listen to: `on_X(callback)` registers, `X_callback(...)` calls all listeners.

Both are generated from the table in scripts/events.py. A failing callback is reported with its file and event; the others are still called.
Must not know the listeners.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from modules.launch.guest_calls import call_guest, end_of_path
from modules.scripts.events import EVENTS, IN_ORDER, Event, find_callback_faults
from modules.scripts.extension_order import OrderRule, order_by_rules
from modules.scripts.hook_arguments import (
    AfterCFGCallbackParams,
    BeforeTokenCounterParams,
    CFGDenoisedParams,
    CFGDenoiserParams,
    ExtraNoiseParams,
    ImageGridLoopParams,
    ImageSaveParams,
    UiTrainTabParams,
)

__all__ = [
    "AfterCFGCallbackParams",
    "BeforeTokenCounterParams",
    "CFGDenoisedParams",
    "CFGDenoiserParams",
    "ExtraNoiseParams",
    "ImageGridLoopParams",
    "ImageSaveParams",
    "UiTrainTabParams",
]

log = logging.getLogger(__name__)

Callback = Callable[..., Any]


class ScriptCallback(NamedTuple):
    """A listener: the file that registered it, the function, and its name among all callbacks."""

    script: str
    callback: Callback
    name: str = "unnamed"


callback_map: dict[str, list[ScriptCallback]] = {f"callbacks_{name}": [] for name in EVENTS}
"""All callbacks by event, in order of registration."""
order_rules: list[OrderRule] = []
"""Order rules from `[callbacks/NAME]` in metadata.ini; filled when extensions are listed."""


# Registering


def add_callback(
    callbacks: list[ScriptCallback], callback: Callback, *, name: str | None = None, category: str = "unknown", filename: str = ""
) -> None:
    """Append `callback` to a list under a unique name: extension/file/event[/name]."""
    filename = filename or _caller_file()
    parts = (*_extension_and_file(filename), category, *([name] if name else []))
    wanted, number = "/".join(parts), 0
    taken = {entry.name for entry in callbacks}
    while (unique := f"{wanted}-{number}" if number else wanted) in taken:
        number += 1
    callbacks.append(ScriptCallback(filename, callback, unique))


def _caller_file() -> str:
    """The first calling file other than this one."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame.f_code.co_filename


def _extension_and_file(filename: str) -> tuple[str, str]:
    path = Path(filename)
    folder = path.parent.parent if path.parent.name == "scripts" else path.parent
    return folder.name.lower(), path.name


def _register(event: Event, callback: Callback, name: str | None) -> None:
    filename = _caller_file()
    who = f"{end_of_path(filename)} listens to on_{event.name}"
    if event.never:
        log.warning("%s, which never fires here: %s.", who, event.never)
    for fault in find_callback_faults(event, callback):
        log.warning("%s with a function that cannot be called: %s", who, fault)
    add_callback(callback_map[f"callbacks_{event.name}"], callback, name=name, category=event.name, filename=filename)


# Removing


def clear_callbacks() -> None:
    """Forget all callbacks."""
    for callbacks in callback_map.values():
        callbacks.clear()


def remove_current_script_callbacks() -> None:
    """Forget the callbacks that the calling file registered."""
    filename = _caller_file()
    for callbacks in callback_map.values():
        callbacks[:] = [entry for entry in callbacks if entry.script != filename]


def remove_callbacks_for_function(callback_func: Callback) -> None:
    """Forget `callback_func` for all events."""
    for callbacks in callback_map.values():
        callbacks[:] = [entry for entry in callbacks if entry.callback != callback_func]


# Calling


def ordered_callbacks(category: str) -> list[ScriptCallback]:
    """The callbacks of an event in call order: as registered, unless a metadata.ini asks for another order."""
    callbacks = list(callback_map[f"callbacks_{category}"])
    if len(callbacks) < 2 or not order_rules:
        return callbacks
    by_name = {entry.name: entry for entry in callbacks}
    return [by_name[name] for name in order_by_rules(list(by_name), order_rules)]


def is_listened_to(*events: str) -> bool:
    """Whether any of `events` has a listener."""
    return any(map(callback_map.__getitem__, map("callbacks_{}".format, events)))  # asked in every step: no generator


def _tell(event: Event, *args: Any, **kwargs: Any) -> list[Any]:
    """The return values of all callbacks; failures are reported and left out."""
    results = []
    entries = ordered_callbacks(event.name)
    for entry in reversed(entries) if event.newest_first else entries:
        task = f"{end_of_path(entry.script)} failed in on_{event.name}; {event.otherwise}"
        well, result = call_guest(partial(entry.callback, *args, **kwargs), task)
        if well:
            results.append(result)
    return results


# `on_X(callback, *, name=None)` and `X_callback(...)` of every event


def _make_registrar(event: Event) -> Callable[..., None]:
    def register(callback: Callback, *, name: str | None = None) -> None:
        _register(event, callback, name)

    register.__name__ = register.__qualname__ = f"on_{event.name}"
    register.__doc__ = f"`{event.called_as}`: {event.sentence}" + (f" Never called: {event.never}." if event.never else "")
    return register


def _make_teller(event: Event) -> Callable[..., Any]:
    def tell(*args: Any, **kwargs: Any) -> list[Any] | None:
        if event.fills_list:
            filled: list[Any] = []
            _tell(event, filled)
            return filled
        results = _tell(event, *args, **kwargs)
        return [item for result in results for item in result or []] if event.joins_lists else None

    tell.__name__ = tell.__qualname__ = event.teller_name
    tell.__doc__ = f"Calls every listener of on_{event.name}: {event.sentence}"
    return tell


for _event in IN_ORDER:
    globals()[f"on_{_event.name}"] = _make_registrar(_event)
    globals()[_event.teller_name] = _make_teller(_event)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]: ...
