"""Writes a unit as a line of generation parameters, and parses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lib_controlnet.enums import Choice
from lib_controlnet.external_code import ControlNetUnit

FIELDS: tuple[tuple[str, str], ...] = (
    ("Module", "module"), ("Model", "model"), ("Weight", "weight"), ("Resize Mode", "resize_mode"), ("Processor Res", "processor_res"),
    ("Threshold A", "threshold_a"), ("Threshold B", "threshold_b"), ("Guidance Start", "guidance_start"), ("Guidance End", "guidance_end"),
    ("Pixel Perfect", "pixel_perfect"), ("Control Mode", "control_mode"), ("Hr Option", "hr_option"),
    ("Union Control Type", "union_control_type"),
)  # fmt: skip


def key_of(number: int) -> str:
    """The parameter's name for a unit."""
    return f"ControlNet {number}"


def write_unit(unit: ControlNetUnit) -> str:
    """`Name: value` pairs, without numbers left to the preprocessor."""
    pairs = ((label, getattr(unit, name)) for label, name in FIELDS)
    return ", ".join(
        f"{label}: {_text(value)}" for label, value in pairs if value is not None and not (isinstance(value, (int, float)) and value < 0)
    )


def _text(value: Any) -> str:
    if isinstance(value, Choice):
        return str(value.value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_unit(text: str) -> dict[str, str]:
    """Label -> text. A part without a label belongs to the previous value (file names may contain commas)."""
    labels = {label for label, _ in FIELDS}
    found: dict[str, list[str]] = {}
    last = ""
    for part in text.split(", "):
        label, colon, value = part.partition(": ")
        if colon and label.strip() in labels:
            last = label.strip()
            found[last] = [value]
        elif last:
            found[last].append(part)
    return {label: ", ".join(parts) for label, parts in found.items()}


def pasted(number: int, name: str, default: Any) -> Callable[[Mapping[str, Any]], Any]:
    """Function that gives a pasted value for a unit's control; None leaves the control unchanged."""

    def read(params: Mapping[str, Any]) -> Any:
        text = params.get(key_of(number))
        if name == "enabled":
            return text is not None
        if text is None:
            return None
        label = next(label for label, field in FIELDS if field == name)
        value = read_unit(str(text)).get(label)
        if value is None:
            return default
        if isinstance(default, bool):
            return value.lower() == "true"
        return float(value) if isinstance(default, (int, float)) else value

    return read
