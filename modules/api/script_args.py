"""Scripts in a request: the selected script, and the flat argument list shared by all scripts of a tab.

Slot 0 is the Script dropdown; each script owns slots `args_from` to `args_to`. Must not know how scripts are loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from modules.errors import RequestError
from modules.scripts.arguments import start_values

log = logging.getLogger(__name__)

FIELDS_OF_REQUEST = frozenset({"sampler", "seed", "refiner", "extra options", "api payload"})
"""Always-on names that copied payloads carry besides the fields of the request that say the same. Forge takes them, and reads the fields alone."""


def find_runner(app: Any, tab: str) -> Any:
    """The tab's script runner; None if the application has no script host."""
    return (getattr(app, "script_runners", None) or {}).get(tab)


def build_script_args(
    runner: Any, *, script_name: str | None, script_args: Sequence[Any], alwayson_scripts: Mapping[str, Any]
) -> tuple[Any, list[Any]]:
    """(the selected script or None, the arguments of all scripts). Raises RequestError for unknown scripts and invalid arguments."""
    selected = _selected_script(runner, script_name)
    arguments = _default_args(runner)
    if selected is not None:
        _put(arguments, selected, script_args, f"script_args of {script_name!r}")
        arguments[0] = list(runner.selectable_scripts).index(selected) + 1
    for name, request in alwayson_scripts.items():
        script = _alwayson_script(runner, name)
        if script is None:
            log.info("alwayson_scripts[%r]: here the request's own fields say that; it has no effect.", name)
            continue
        if not isinstance(request, Mapping) or not isinstance(request.get("args", []), (list, Mapping)):
            raise RequestError(f'alwayson_scripts[{name!r}]: expected {{"args": [...]}}, or {{"args": {{LABEL: VALUE}}}}.')
        values, where = request.get("args", []), f"alwayson_scripts[{name!r}].args"
        if isinstance(values, Mapping):
            _put_named(arguments, script, values, where)
        else:
            _put(arguments, script, values, where)
    return selected, arguments


def _titles(scripts: Sequence[Any]) -> str:
    return ", ".join(str(script.title()) for script in scripts) or "none"


def _by_title(scripts: Sequence[Any], title: str) -> Any:
    return next((script for script in scripts if str(script.title()).lower() == title.lower()), None)


def _selected_script(runner: Any, name: str | None) -> Any:
    if name in (None, "", "None"):
        return None
    scripts = [] if runner is None else list(runner.selectable_scripts)
    found = _by_title(scripts, str(name))
    if found is None:
        raise RequestError(f"Script {name!r} not found. Scripts here: {_titles(scripts)}.")
    return found


def _alwayson_script(runner: Any, name: str) -> Any:
    """The script `name`; None for one of FIELDS_OF_REQUEST. Raises RequestError."""
    alwayson = [] if runner is None else list(runner.alwayson_scripts)
    found = _by_title(alwayson, name)
    if found is not None or name.lower() in FIELDS_OF_REQUEST:
        return found
    if runner is not None and _by_title(list(runner.selectable_scripts), name) is not None:
        raise RequestError(f"Cannot have a selectable script in the always on scripts params: {name!r}; send it as script_name.")
    raise RequestError(f"Always on script {name!r} not found. Always on scripts here: {_titles(alwayson)}.")


def _default_args(runner: Any) -> list[Any]:
    """Start values of all script controls; slot 0 selects no script."""
    scripts = [] if runner is None else list(runner.scripts)
    arguments: list[Any] = [None] * max([1, *(script.args_to for script in scripts if script.args_to)])
    arguments[0] = 0
    for slot, value in (start_values(runner) if runner is not None else {}).items():
        arguments[slot] = value
    return arguments


def _put(arguments: list[Any], script: Any, values: Sequence[Any], where: str) -> None:
    room = (script.args_to or 0) - (script.args_from or 0)
    if len(values) > room:
        raise RequestError(f"{where}: {len(values)} values were sent; the script takes at most {room}.")
    if values:
        arguments[script.args_from : script.args_from + len(values)] = list(values)


def _put_named(arguments: list[Any], script: Any, values: Mapping[str, Any], where: str) -> None:
    """Values by control label (any case) or DOM id."""
    slots: dict[str, int] = {}
    for slot, control in enumerate(script.controls or (), start=script.args_from or 0):
        for name in (getattr(control, "label", None), getattr(control, "elem_id", None)):
            slots.setdefault(str(name or "").lower(), slot)
    slots.pop("", None)
    for name, value in values.items():
        if name.lower() not in slots:
            labels = ", ".join(str(getattr(control, "label", None)) for control in script.controls or ()) or "none"
            raise RequestError(f"{where}: there is no control {name!r}. Controls of this script: {labels}.")
        arguments[slots[name.lower()]] = value
