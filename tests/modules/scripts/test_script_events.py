"""The generated functions of script_callbacks and ScriptRunner, checked against their tables."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from modules.scripts import callbacks
from modules.scripts.base import AlwaysVisible, Script
from modules.scripts.events import EVENTS, Event, find_callback_faults
from modules.scripts.files import ScriptClassData
from modules.scripts.hooks import HOOKS
from modules.scripts.runner import ScriptRunner


@pytest.fixture(autouse=True)
def no_callbacks() -> Iterator[None]:
    kept = {name: list(entries) for name, entries in callbacks.callback_map.items()}
    callbacks.clear_callbacks()
    yield
    for name, entries in kept.items():
        callbacks.callback_map[name][:] = entries


@pytest.mark.parametrize("event", EVENTS.values(), ids=list(EVENTS))
def test_every_event_can_be_listened_to_and_told(event: Event) -> None:
    heard: list[Any] = []

    def listen(*args: Any, **kwargs: Any) -> list[str]:
        heard.append((args, kwargs))
        if event.fills_list:
            args[0].append("found")
        return ["found"]

    getattr(callbacks, f"on_{event.name}")(listen, name="mine")
    given = () if event.fills_list else event.values
    told = getattr(callbacks, event.teller_name)(*given, **({"elem_id": "a"} if event.any_keyword else {}))
    assert heard == [((["found"],) if event.fills_list else event.values, {"elem_id": "a"} if event.any_keyword else {})]
    assert told == (["found"] if event.fills_list or event.joins_lists else None)
    assert callbacks.callback_map[f"callbacks_{event.name}"][0].name.endswith(f"/test_script_events.py/{event.name}/mine")


def test_events_that_undo_are_told_backwards() -> None:
    told: list[int] = []
    for number in range(3):
        callbacks.on_script_unloaded(lambda number=number: told.append(number))
    callbacks.script_unloaded_callback()
    assert told == [2, 1, 0]


@pytest.mark.parametrize(
    ("event", "callback", "word"),
    [
        ("image_saved", lambda: None, "takes 0 arguments; it is called as callback(params)"),
        ("app_started", lambda demo: None, "takes 1 arguments; it is called as callback(demo, app)"),
        ("after_component", lambda component: None, "add **kwargs: callback(component, **kwargs)"),
        ("ui_tabs", eval("lambda *, tab: []"), "requires unknown tab"),
    ],
)
def test_a_callback_that_cannot_be_called_is_named_when_it_registers(event: str, callback: Any, word: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        getattr(callbacks, f"on_{event}")(callback)
    assert [record for record in caplog.messages if word in record and f"on_{event}" in record and "scripts/test_script_events.py" in record]


@pytest.mark.parametrize("callback", [print, [].append, lambda *args: None, lambda params, extra=None: None])
def test_a_callback_that_can_be_called_is_not_complained_of(callback: Any) -> None:
    assert list(find_callback_faults(EVENTS["image_saved"], callback)) == []


def test_the_runner_has_a_method_for_every_hook_and_passes_values_as_the_hook_names_them() -> None:
    calls: list[Any] = []

    def record(name: str) -> Any:
        return lambda self, p, *values, **keywords: calls.append((name, values, keywords))

    hooks = {name: record(name) for name in HOOKS if name not in ("setup", "run")}
    listening = type("Listening", (Script,), {"title": lambda self: "listening", "show": lambda self, is_img2img: AlwaysVisible, **hooks})
    runner = ScriptRunner(lambda: [ScriptClassData(listening, "ext/scripts/a.py", "ext", None)])
    runner.initialize_scripts(False)
    for name in hooks:
        getattr(runner, name)("p", *HOOKS[name].values, *HOOKS[name].keywords)
    assert calls == [(name, HOOKS[name].values, {key: key for key in HOOKS[name].keywords}) for name in hooks]
    assert {f"script_{name}" for name in hooks} <= set(runner.callback_names)
