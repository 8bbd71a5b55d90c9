"""The arguments a script gets from untouched controls. Uses only attributes of controls; does not import gradio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def start_value(control: Any) -> Any:
    """A control's value as scripts receive it: the number of a choice for `type="index"`, "" for an empty text field."""
    value, choices = getattr(control, "value", None), getattr(control, "choices", None)
    if value is None and _is_text(control):
        return ""
    if getattr(control, "type", None) != "index" or not isinstance(choices, list):
        return value
    values = [choice[1] if isinstance(choice, (tuple, list)) else choice for choice in choices]
    if isinstance(value, list):
        return [values.index(item) for item in value if item in values]
    return values.index(value) if value in values else None


def _is_text(control: Any) -> bool:
    return any(cls.__name__ == "Textbox" for cls in type(control).__mro__)


def start_values(runner: Any) -> Mapping[int, Any]:
    """Slot -> start value."""
    return {
        script.args_from + index: start_value(control)
        for script in runner.scripts
        if script.args_from is not None
        for index, control in enumerate(script.controls or ())
    }
