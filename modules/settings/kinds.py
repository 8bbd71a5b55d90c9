"""Short builders for built-in settings, used by settings/table.py and settings/page_table.py. Components are gradio class names."""

from __future__ import annotations

from typing import Any

from modules.settings.options import FILE_OF_LOGS, FOLDER_FOR_OUTPUTS, FOLDER_OR_FILE, OptionInfo

OptionTable = dict[str, OptionInfo]


def option(
    default: Any, label: str, component: str | None = None, *, infotext: str | None = None, info: str = "", api: bool = True, **args: Any
) -> OptionInfo:
    """Any setting; `args` are passed to its component."""
    built = OptionInfo(default, label, component, args or None, infotext=infotext, restrict_api=not api)
    return built.info(info) if info else built


def slider(default: float, label: str, low: float, high: float, step: float, *, strict: bool = False, **kwargs: Any) -> OptionInfo:
    """A number. `low` and `high` limit only the page, unless `strict`: then also the API and the file."""
    built = option(default, label, "Slider", minimum=low, maximum=high, step=step, **kwargs)
    built.limits = (low, high) if strict else None
    return built


def choice(default: str, label: str, *choices: str, component: str = "Radio", **kwargs: Any) -> OptionInfo:
    """One of fixed texts; others are rejected."""
    built = option(default, label, component, choices=list(choices), **kwargs)
    built.allowed = choices
    return built


def text(default: str, label: str, **kwargs: Any) -> OptionInfo:
    return option(default, label, "Textbox", **kwargs)


def output_folder(default: str, label: str) -> OptionInfo:
    """A folder in which pictures or texts are written."""
    return _path(default, label, FOLDER_FOR_OUTPUTS)


def source_path(default: str, label: str) -> OptionInfo:
    """A folder or file that is read."""
    return _path(default, label, FOLDER_OR_FILE)


def log_file(default: str, label: str) -> OptionInfo:
    """The name of a file in the logs folder."""
    return _path(default, label, FILE_OF_LOGS)


def _path(default: str, label: str, kind: str) -> OptionInfo:
    built = text(default, label)
    built.path_kind = kind
    return built


def color(default: str, label: str) -> OptionInfo:
    return option(default, label, "ColorPicker")


def text_list(default: list[str], label: str, **kwargs: Any) -> OptionInfo:
    return option(default, label, "DropdownMulti", **kwargs)
