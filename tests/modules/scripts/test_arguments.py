"""Values of a script against the bounds of its controls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from modules.errors import RequestError
from modules.scripts.arguments import checked_values


def script(*controls: Any) -> Any:
    return SimpleNamespace(title=lambda: "Tiler", controls=controls)


@pytest.fixture(scope="module")
def controls() -> dict[str, Any]:
    with gr.Blocks():
        return {
            "share": gr.Slider(label="Share", minimum=0, maximum=1, step=0.5),
            "count": gr.Slider(label="Count", minimum=1, maximum=9, step=1),
            "on": gr.Checkbox(label="On"),
            "kind": gr.Radio(label="Kind", choices=["a", ("shown", "b")]),
            "number": gr.Radio(label="Number", choices=["a", "b"], type="index"),
            "typed": gr.Dropdown(label="Typed", choices=["a"], allow_custom_value=True),
            "text": gr.Textbox(label="Text"),
        }


@pytest.mark.parametrize(
    ("name", "sent", "read"),
    [
        *(("share", sent, 0.5) for sent in (0.5, "0.5", " 5e-1 ")),
        *(("count", sent, 3) for sent in (3, 3.0, "3")),
        *(("on", sent, sent) for sent in (True, False)),
        *(("on", None, False), ("kind", "b", "b"), ("number", 1, 1), ("typed", "anything", "anything"), ("text", None, None)),
    ],
)
def test_a_value_is_read_as_its_control_has_it(controls: dict[str, Any], name: str, sent: Any, read: Any) -> None:
    (value,) = checked_values(script(controls[name]), [sent])
    assert value == read and type(value) is type(read)


@pytest.mark.parametrize(
    ("name", "sent", "says"),
    [
        *(("share", sent, "Tiler: Share is .*; send a number from 0 to 1") for sent in (1.5, -1, "much", float("nan"), float("inf"), None, True, [])),
        *(("on", sent, "Tiler: On is .*; send true or false") for sent in ("yes", 2, [])),
        *(("kind", sent, "Tiler: Kind is .*; choose one of a, b") for sent in ("shown", 0, None, [])),
        *(("number", sent, "Tiler: Number is .*; choose one of 0, 1") for sent in (2, "a", True)),
    ],
)
def test_a_value_beyond_its_control_is_refused(controls: dict[str, Any], name: str, sent: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        checked_values(script(controls[name]), [sent])


def test_values_without_a_control_are_passed_on(controls: dict[str, Any]) -> None:
    assert checked_values(script(controls["on"]), [True, "more"]) == [True, "more"]
