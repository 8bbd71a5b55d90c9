"""Settings: their definition (OptionInfo), the store that is saved to a file (Options), and a job's frozen view (OptionsSnapshot).

Must not know any particular setting (settings/table.py defines them), nor gradio: a component is a gradio class or the name of one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backend.unfinished_files import replace_content
from modules.errors import OptionError
from modules.settings.file import back_up, problem_with, read_settings

log = logging.getLogger(__name__)

# overrides of the job running in this context; settings read through the store include them, as extensions expect
active_overrides: ContextVar[Mapping[str, Any]] = ContextVar("active_overrides", default=MappingProxyType({}))

FOLDER_FOR_OUTPUTS, FOLDER_OR_FILE, FILE_OF_LOGS = "folder for outputs", "folder or file", "file of logs"
"""What a setting names on disk, if anything (OptionInfo.path_kind)."""

_TRUE_WORDS = frozenset({"true", "yes", "on", "1"})
_FALSE_WORDS = frozenset({"false", "no", "off", "0", ""})


class OptionInfo:
    """One setting: default, label, presentation. The chainable methods return self."""

    do_not_save = False

    def __init__(
        self,
        default: Any = None,
        label: str = "",
        component: Any = None,
        component_args: Any = None,
        onchange: Callable[[], object] | None = None,
        section: tuple[Any, ...] | None = None,
        refresh: Callable[[], object] | None = None,
        comment_before: str = "",
        comment_after: str = "",
        infotext: str | None = None,
        restrict_api: bool = False,
        category_id: str | None = None,
    ) -> None:
        self.default = default
        self.label = label
        self.component = component
        self.component_args = component_args
        self.onchange = onchange
        self.section: tuple[Any, ...] | None = section
        self.category_id = category_id
        self.refresh = refresh
        self.comment_before = comment_before
        self.comment_after = comment_after
        self.infotext = infotext
        self.restrict_api = restrict_api
        self.limits: tuple[float, float] | None = None  # bounds of the value, from any source
        self.allowed: tuple[str, ...] | None = None  # the only valid texts
        self.path_kind: str | None = None  # what its value names on disk, if anything

    def link(self, label: str, url: str) -> OptionInfo:
        self.comment_before += f"[<a href='{url}' target='_blank'>{label}</a>]"
        return self

    def js(self, label: str, js_func: str) -> OptionInfo:
        self.comment_before += f"[<a onclick='{js_func}(); return false'>{label}</a>]"
        return self

    def info(self, info: str) -> OptionInfo:
        self.comment_after += f"<span class='info'>({info})</span>"
        return self

    def html(self, html: str) -> OptionInfo:
        self.comment_after += html
        return self

    def needs_restart(self) -> OptionInfo:
        self.comment_after += " <span class='info'>(requires restart)</span>"
        return self

    def needs_reload_ui(self) -> OptionInfo:
        self.comment_after += " <span class='info'>(requires Reload UI)</span>"
        return self

    def cast(self, key: str, value: Any) -> Any:
        """`value` converted to the default's type and checked against the setting's limits. Raises OptionError."""
        if value is None:
            return None if self.default is None else self.default
        if (why := problem_with(value)) is not None:
            raise OptionError(f"setting {key!r}: this value cannot be stored: {why}.")
        if self.default is None:
            return self._check(key, self._cast_without_default(key, value))
        return self._check(key, _cast_like(key, value, self.default))

    def _cast_without_default(self, key: str, value: Any) -> Any:
        """A number if the page has a numeric control, else text; a list of texts if the control takes several."""
        component = self.component if isinstance(self.component, str) else getattr(self.component, "__name__", "")
        if component in ("Number", "Slider"):
            return _cast_int(key, value)
        if isinstance(value, (list, tuple)) and component in ("DropdownMulti", "CheckboxGroup", "Dropdown", ""):
            return _cast_list(key, value, [""])
        if isinstance(value, (str, int, float)):
            return value if component == "" or isinstance(value, str) else str(value)
        raise _wrong_type(key, value, "a text or a number")

    def _check(self, key: str, value: Any) -> Any:
        if self.limits is not None and not self.limits[0] <= value <= self.limits[1]:
            raise OptionError(f"setting {key!r}: {value} is outside {self.limits[0]}..{self.limits[1]}.")
        if self.allowed is not None and value not in self.allowed:
            raise OptionError(f"setting {key!r}: {value!r} is not one of {', '.join(map(repr, self.allowed))}.")
        return value


class OptionHTML(OptionInfo):
    """Text on the settings page; it has no value."""

    do_not_save = True

    def __init__(self, text: str) -> None:
        super().__init__(str(text).strip(), label="", component="HTML", component_args=lambda: {"elem_classes": "settings-info"})


def options_section(section_identifier: tuple[Any, ...], options_dict: dict[str, OptionInfo]) -> dict[str, OptionInfo]:
    """Put all options of `options_dict` into the section (id, label[, category id]); returns the same dict."""
    for info in options_dict.values():
        info.section = tuple(section_identifier[:2])
        if len(section_identifier) > 2:
            info.category_id = section_identifier[2]
    return options_dict


def _wrong_type(key: str, value: Any, wanted: str) -> OptionError:
    return OptionError(f"setting {key!r}: expected {wanted}, got {_shown(value)}.")


def _shown(value: Any) -> str:
    """The value's type, and the value if it is short."""
    return f"{type(value).__name__} {str(value)[:80]!r}" if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def _cast_bool(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _TRUE_WORDS | _FALSE_WORDS:
        return value.strip().lower() in _TRUE_WORDS
    raise _wrong_type(key, value, "true or false")


def _cast_float(key: str, value: Any) -> float:
    if not isinstance(value, (int, float, str)):
        raise _wrong_type(key, value, "a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _wrong_type(key, value, "a number") from None
    if not math.isfinite(number):
        raise OptionError(f"setting {key!r}: {value} is not a finite number.")
    return number


def _cast_int(key: str, value: Any) -> int | float:
    if isinstance(value, int):
        return int(value)
    number = _cast_float(key, value)
    return int(number) if number.is_integer() else number


def _cast_list(key: str, value: Any, default: list[Any]) -> list[Any]:
    """Members have the type of the default's members; if the default is empty, they are texts or numbers."""
    if not isinstance(value, (list, tuple)):
        raise _wrong_type(key, value, "a list")
    kinds = {type(member) for member in default}
    if kinds and not kinds <= {str, int, float, bool}:
        return list(value)  # a structure of an extension
    for member in value:
        if not isinstance(member, (str, int, float)):
            raise _wrong_type(key, member, "texts or numbers in its list")
    return [_cast_like(key, member, default[0]) for member in value] if len(kinds) == 1 else list(value)


def _cast_like(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, bool):
        return _cast_bool(key, value)
    if isinstance(default, int):
        return _cast_int(key, value)
    if isinstance(default, float):
        return _cast_float(key, value)
    if isinstance(default, list):
        return _cast_list(key, value, default)
    if isinstance(default, str):
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        raise _wrong_type(key, value, "a text")
    if isinstance(default, dict) and not isinstance(value, dict):
        raise _wrong_type(key, value, "an object")
    return value


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` with a file containing `text`: readers see the whole old or the whole new file, even after a crash."""
    replace_content(path, text.encode("utf-8"))


Guard = Callable[[str, OptionInfo, Any], None]
"""Raises OptionError for a value that may not be set while the program runs."""


class OptionsSnapshot(Mapping[str, Any]):
    """All settings at one moment. Read by key or attribute; read-only."""

    __slots__ = ("_guard", "_labels", "_values")

    def __init__(self, labels: Mapping[str, OptionInfo], values: Mapping[str, Any], guard: Guard | None = None) -> None:
        object.__setattr__(self, "_guard", guard)
        object.__setattr__(self, "_labels", labels)
        object.__setattr__(self, "_values", dict(values))

    def __getitem__(self, key: str) -> Any:
        if key in self._values:
            return self._values[key]
        info = self._labels.get(key)
        if info is None or info.do_not_save:
            raise KeyError(key)
        return info.default

    def __iter__(self) -> Iterator[str]:
        seen = dict.fromkeys(key for key, info in self._labels.items() if not info.do_not_save)
        return iter(seen | dict.fromkeys(self._values))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no setting {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"setting {name!r} cannot be changed in a job's snapshot; use override_settings")

    def with_overrides(self, overrides: Mapping[str, Any]) -> OptionsSnapshot:
        """This snapshot with `overrides` on top; unknown keys, and keys that requests may not change, are ignored with a warning.

        Raises OptionError for an invalid value."""
        known: dict[str, Any] = {}
        for key, value in overrides.items():
            info = self._labels.get(key)
            if info is None:
                log.warning("override_settings: there is no setting %r; it is ignored.", key)
                continue
            cast = info.cast(key, value)
            if not info.do_not_save and cast != self[key]:
                if info.restrict_api:
                    log.warning("override_settings: requests may not change the setting %r; it is ignored.", key)
                    continue
                if self._guard is not None:
                    self._guard(key, info, cast)
            known[key] = cast
        return OptionsSnapshot(self._labels, {**self._values, **known}, self._guard)


_OWN_ATTRIBUTES = frozenset({"data", "data_labels", "restricted_opts", "frozen_keys", "guard", "_lock"})


class Options:
    """The saved settings. Thread-safe. Attributes are settings: `opts.samples_format`."""

    typemap: Mapping[Any, Any] = {int: float}

    def __init__(
        self,
        data_labels: dict[str, OptionInfo],
        restricted_opts: Collection[str] = (),
        *,
        frozen_keys: frozenset[str] = frozenset(),
        guard: Guard | None = None,
    ) -> None:
        fields = {"data_labels": data_labels, "restricted_opts": set(restricted_opts), "frozen_keys": frozen_keys, "_lock": threading.RLock()}
        fields["guard"] = guard
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "data", {key: info.default for key, info in data_labels.items() if not info.do_not_save})

    def __getattr__(self, item: str) -> Any:
        if item.startswith("__"):
            raise AttributeError(item)
        data, labels = self.__dict__.get("data", {}), self.__dict__.get("data_labels", {})
        if item in labels and item in active_overrides.get() and not labels[item].restrict_api:
            return labels[item].cast(item, active_overrides.get()[item])
        if item in data:
            return data[item]
        if item in labels:
            return labels[item].default
        raise AttributeError(f"there is no setting {item!r}")

    def __setattr__(self, key: str, value: Any) -> None:
        if key in _OWN_ATTRIBUTES or key not in self.data_labels:
            object.__setattr__(self, key, value)
            return
        self._require_changeable(key)
        with self._lock:
            self.data[key] = value

    def _require_changeable(self, key: str) -> None:
        if key in self.frozen_keys:
            raise OptionError(f"setting {key!r} is frozen by --freeze-settings; start without the flag to change it.")
        if key in self.restricted_opts:
            raise OptionError(f"setting {key!r} may not be changed while --hide-ui-dir-config is on.")

    def set(self, key: str, value: Any, is_api: bool = False, run_callbacks: bool = True) -> bool:
        """Change a setting; returns whether its value changed. Raises OptionError for an unknown key or a value of the wrong type.

        A setting that the API may not change stays unchanged (returns False)."""
        info = self.data_labels.get(key)
        if info is None:
            raise OptionError(f"there is no setting {key!r}.")
        if info.do_not_save or (is_api and info.restrict_api):
            return False
        value = info.cast(key, value)
        with self._lock:
            old_value = self.data.get(key, info.default)
            if old_value == value:
                return False
            self._require_changeable(key)
            if self.guard is not None:
                self.guard(key, info, value)
            self.data[key] = value
        if run_callbacks and info.onchange is not None:
            self._run_onchange(key, info, old_value)
        return True

    def _run_onchange(self, key: str, info: OptionInfo, old_value: Any) -> None:
        assert info.onchange is not None
        try:
            info.onchange()
        except Exception:
            with self._lock:
                self.data[key] = old_value
            raise

    def get_default(self, key: str) -> Any:
        info = self.data_labels.get(key)
        return None if info is None else info.default

    def onchange(self, key: str, func: Callable[[], object], call: bool = True) -> None:
        """Call `func` whenever `key` changes through set(); also immediately, unless `call` is false."""
        info = self.data_labels.get(key)
        if info is None:
            raise OptionError(f"there is no setting {key!r}.")
        info.onchange = func
        if call:
            func()

    def snapshot(self, overrides: Mapping[str, Any] | None = None) -> OptionsSnapshot:
        """The current settings, frozen."""
        with self._lock:
            frozen = OptionsSnapshot(dict(self.data_labels), self.data, self.guard)
        inherited = active_overrides.get()
        return frozen.with_overrides({**inherited, **(overrides or {})}) if inherited or overrides else frozen

    def save(self, filename: str | os.PathLike[str]) -> None:
        """Write the settings atomically. Keys that no option defines are kept as read."""
        if self.frozen_keys and self.frozen_keys >= set(self.data_labels):
            raise OptionError("settings are frozen by --freeze-settings; start without the flag to save them.")
        with self._lock:
            write_text_atomically(Path(filename), json.dumps(self.data, indent=4, ensure_ascii=False))

    def load(self, filename: str | os.PathLike[str]) -> None:
        """Read the settings file if it exists. Unreadable values get their defaults, with a warning each; the file is then backed up."""
        path = Path(filename)
        if not path.exists():
            return
        if not path.is_file():
            log.error("%s is not a file; defaults apply. It was moved to %s.", path, back_up(path))
            return
        try:
            loaded, problems = read_settings(path)
        except OSError as error:
            log.error("%s cannot be read (%s); defaults apply.", path, error)
            return
        with self._lock:
            for key, value in loaded.items():
                try:
                    self.data[key] = self._value_from_file(key, value)
                except OptionError as error:
                    problems[key] = f"{error} Its default {self.get_default(key)!r} is used."
        if problems:
            self._report(path, problems)

    def _report(self, path: Path, problems: Mapping[str, str]) -> None:
        """One warning per key, and the name of the backup copy."""
        aside = back_up(path)
        kept = f"A copy was saved as {aside.name}." if aside is not None else "No copy could be saved."
        for key, why in problems.items():
            if key:
                log.warning("%s: setting %r: %s; other settings are kept. %s", path.name, key, why.rstrip("."), kept)
            else:
                log.error("%s cannot be read (%s); defaults apply to missing settings. %s", path, why, kept)

    def _value_from_file(self, key: str, value: Any) -> Any:
        """Raises OptionError."""
        info = self.data_labels.get(key)
        return value if info is None else info.cast(key, value)

    def dumpjson(self) -> str:
        """All settings as JSON, with the comments shown next to them on the page."""
        labels = self.data_labels
        values: dict[str, Any] = {key: self.data.get(key, info.default) for key, info in labels.items() if not info.do_not_save}
        values["_comments_before"] = {key: info.comment_before for key, info in labels.items() if info.comment_before}
        values["_comments_after"] = {key: info.comment_after for key, info in labels.items() if info.comment_after}
        values["_categories"] = self._categories()
        return json.dumps(values)

    def _categories(self) -> list[list[str]]:
        categories: dict[str, str] = {}
        for info in self.data_labels.values():
            if info.section and info.category_id and info.section[0]:
                categories.setdefault(info.category_id, str(info.section[1]))
        return [[category_id, label] for category_id, label in categories.items()]

    def add_option(self, key: str, info: OptionInfo) -> None:
        """Define an additional setting (extensions do). A value read earlier from the file still applies."""
        with self._lock:
            if self.frozen_keys and self.frozen_keys >= set(self.data_labels):  # --freeze-settings also applies to settings added later
                object.__setattr__(self, "frozen_keys", self.frozen_keys | {key})
            self.data_labels[key] = info
            if info.do_not_save:
                return
            if key in self.data:
                try:
                    self.data[key] = self._value_from_file(key, self.data[key])
                except OptionError as error:
                    log.warning("settings file: %s Its default %r is used.", error, info.default)
                    self.data[key] = info.default
            else:
                self.data[key] = info.default

    def reorder(self) -> None:
        """Group settings by section, in the order of each section's first setting; sections without a name come last."""
        order: dict[Any, int] = {}
        for info in self.data_labels.values():
            order.setdefault(_section_id(info), len(order))
        with self._lock:
            ordered = sorted(self.data_labels.items(), key=lambda item: (_section_id(item[1]) is None, order[_section_id(item[1])]))
            self.data_labels.clear()
            self.data_labels.update(ordered)

    def cast_value(self, key: str, value: Any) -> Any:
        """`value` converted to this setting's type; None stays None. Raises OptionError."""
        info = self.data_labels.get(key)
        return value if info is None or value is None else info.cast(key, value)

    def same_type(self, x: Any, y: Any) -> bool:
        """Whether x may replace y: None matches anything, int matches float."""
        if x is None or y is None:
            return True
        kinds: list[Any] = [self.typemap.get(kind, kind) for kind in (type(x), type(y))]
        return kinds[0] is kinds[1]


def _section_id(info: OptionInfo) -> Any:
    return info.section[0] if info.section else None
