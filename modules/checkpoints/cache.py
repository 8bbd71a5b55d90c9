"""Facts about files, cached between runs in `cache/<section>.json`. An entry is valid while the file's time and size stay the same."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from backend.foreign_json import read_json_file
from modules.jobs.context import required_context
from modules.settings.options import write_text_atomically

log = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")


class FileCache:
    """Sections of name -> value, each saved as one JSON file on change. With an unwritable folder, entries last for this run only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._sections: dict[str, dict[str, Any]] = {}

    def section(self, name: str) -> dict[str, Any]:
        """The section's live dictionary; call save() after changing it."""
        with self._lock:
            if name not in self._sections:
                self._sections[name] = self._read(name)
            return self._sections[name]

    def save(self, name: str) -> None:
        with self._lock:
            text = json.dumps(self.section(name), indent=1)
            try:
                write_text_atomically(self._path(name), text)
            except OSError as error:
                log.warning("%s could not be written (%s); it will be rebuilt at the next start.", self._path(name), error)

    def for_file(self, section: str, title: str, path: Path, make: Callable[[], ValueT | None]) -> ValueT | None:
        """The value that `make` returned when this file last changed. Raises OSError if the file is gone."""
        value = self.peek(section, title, path)
        if value is None and (value := make()) is not None:
            with self._lock:
                self.section(section)[title] = {**_file_stamp(path), "path": str(path), "value": value}
                self.save(section)
        return value

    def peek(self, section: str, title: str, path: Path) -> Any:
        """The cached value; None if there is none or the file has changed."""
        entry = self.section(section).get(title)
        if not isinstance(entry, dict) or entry.get("path") != str(path):
            return None
        stamp = _file_stamp(path)
        return entry.get("value") if all(entry.get(key) == value for key, value in stamp.items()) else None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, name: str) -> dict[str, Any]:
        try:
            data = read_json_file(self._path(name))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read (%s); it is rebuilt.", self._path(name), error)
            return {}
        return data if isinstance(data, dict) else {}


def _file_stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"mtime_ns": stat.st_mtime_ns, "num_bytes": stat.st_size}


# Names that extensions call; they use the installed application's cache.


def _installed() -> FileCache:
    return required_context().file_cache


def cache(subsection: str) -> dict[str, Any]:
    return _installed().section(subsection)


def dump_cache() -> None:
    """Save every section that was read or changed."""
    store = _installed()
    for name in list(store._sections):
        store.save(name)


def cached_data_for_file(subsection: str, title: str, filename: str | os.PathLike[str], func: Callable[[], ValueT | None]) -> ValueT | None:
    return _installed().for_file(subsection, title, Path(filename), func)
