"""The arguments of a script: those of untouched controls, and values checked against their controls. Uses only attributes of controls; does not
import gradio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modules.errors import RequestError


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


def checked_values(script: Any, values: Sequence[Any]) -> list[Any]:
    """The values of a script's controls, each within its control's bounds: a slider's as a number, a choice that is there, a checkbox's as a bool.

    Example: a slider of 0..2 with step 0.01 turns "1.5" into 1.5 and refuses 3 and NaN. Values of other controls are passed as they are.
    Raises: RequestError that names the script, the control and the bounds.
    """
    controls = list(script.controls or ())
    return [_checked(script.title(), controls[index], value) if index < len(controls) else value for index, value in enumerate(values)]


def checked_value(script: Any, label: str, value: Any) -> Any:
    """`value` within the bounds of the script's control with this label. Raises: RequestError."""
    control = next(control for control in script.controls if control.label == label)
    return _checked(script.title(), control, value)


def _checked(title: str, control: Any, value: Any) -> Any:
    label, kind = f"{title}: {control.label}", {cls.__name__ for cls in type(control).__mro__}
    if "Slider" in kind:
        return _checked_number(label, value, control.minimum, control.maximum, whole=_is_whole(control))
    if "Checkbox" in kind:
        if value not in (True, False, None):
            raise RequestError(f"{label} is {_shown(value)}; send true or false.")
        return bool(value)
    if "Radio" in kind or ("Dropdown" in kind and not control.multiselect and not control.allow_custom_value):
        return _checked_choice(label, value, control)
    return value


def _is_whole(control: Any) -> bool:
    return all(isinstance(number, int) or float(number).is_integer() for number in (control.minimum, control.maximum, control.step or 0.5))


def _checked_number(label: str, value: Any, low: float, high: float, *, whole: bool) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):  # the last: a whole number of more than 308 digits
        number = float("nan")
    if not low <= number <= high:  # refuses NaN too
        raise RequestError(f"{label} is {_shown(value)}; send a number from {low:g} to {high:g}.")
    return int(number) if whole else number


def _checked_choice(label: str, value: Any, control: Any) -> Any:
    choices = [choice[1] if isinstance(choice, (tuple, list)) else choice for choice in control.choices or ()]
    if getattr(control, "type", None) == "index":
        choices = list(range(len(choices)))
    if isinstance(value, bool) or value not in choices:
        raise RequestError(f"{label} is {_shown(value)}; choose one of {', '.join(map(str, choices))}.")
    return value


def _shown(value: Any) -> str:
    return repr(value)[:100]
