"""Brings the table up to date with the outputs folder: only folders whose time has changed are listed, only files that have changed are opened.

Links and hidden folders are not followed. Must not know who asks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from modules.history.index import HistoryIndex, PictureFacts
from modules.history.reading import PICTURE_SUFFIXES, read_facts

log = logging.getLogger(__name__)

MAX_DEPTH = 16
FILES_AT_ONCE = 200
SETTLED_NS = 2_000_000_000
"""A folder changed this short a time ago may change again without its time saying so; it is listed again."""


class Scan:
    """One pass over `root`."""

    def __init__(self, index: HistoryIndex, root: Path, stop: threading.Event) -> None:
        self.index, self.root, self.stop = index, root, stop
        self.known = index.folders()
        self.known_children: dict[str, list[str]] = {}
        for path in self.known:
            if path:
                self.known_children.setdefault(path.rpartition("/")[0], []).append(path)
        self.seen: set[str] = set()
        self.num_changed = 0

    def run(self) -> int:
        """Number of pictures that were added, changed or forgotten."""
        self._visit("", 0)
        if not self.stop.is_set():
            for folder in self.known.keys() - self.seen:
                self.num_changed += len(self.index.known_files(folder))
                self.index.forget_folder(folder)
        return self.num_changed

    def _visit(self, folder: str, depth: int) -> None:
        if self.stop.is_set() or depth > MAX_DEPTH:
            return
        try:
            mtime_ns = (self.root / folder).stat().st_mtime_ns
            children = self.known_children.get(folder, []) if self.known.get(folder) == mtime_ns else self._list(folder, mtime_ns)
        except OSError as error:
            log.debug("history: %s is left out: %s", self.root / folder, error)
            return
        self.seen.add(folder)
        for child in children:
            self._visit(child, depth + 1)

    def _list(self, folder: str, mtime_ns: int) -> list[str]:
        """Update the files of a folder; returns its folders."""
        children, files = [], dict[str, os.stat_result]()
        with os.scandir(self.root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith(".") or not _is_text(path):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    children.append(path)
                elif entry.is_file(follow_symlinks=False) and Path(entry.name).suffix.lower() in PICTURE_SUFFIXES:
                    files[path] = entry.stat(follow_symlinks=False)
        known = self.index.known_files(folder)
        gone = known.keys() - files.keys()
        changed = {path: stat for path, stat in files.items() if known.get(path) != (stat.st_mtime_ns, stat.st_size)}
        self.index.forget(gone)
        self._read(changed)
        self.num_changed += len(gone) + len(changed)
        if not self.stop.is_set() and time.time_ns() - mtime_ns > SETTLED_NS:
            self.index.put_folder(folder, mtime_ns)
        return children

    def _read(self, files: dict[str, os.stat_result]) -> None:
        batch: list[PictureFacts] = []
        for facts in self._facts(files):
            batch.append(facts)
            if len(batch) == FILES_AT_ONCE:
                self.index.put(batch)
                batch = []
        self.index.put(batch)

    def _facts(self, files: dict[str, os.stat_result]) -> Iterator[PictureFacts]:
        for path, stat in files.items():
            if self.stop.is_set():
                return
            yield read_facts(self.root, path, stat)


def _is_text(path: str) -> bool:
    """Whether the name can be stored: a name with bytes that are no text cannot."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
