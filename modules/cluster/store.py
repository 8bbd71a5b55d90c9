"""Accepted jobs on disk, so that a front that is killed and started again still has them. One SQLite file; knows no requests.

A job is in the file from before its client learns that it was accepted until after it has ended. Order is by a counting number, never by a clock.
A damaged file is set aside, not deleted, and a new one begun; a full disk refuses the job.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from modules.errors import RequestError

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

_LAYOUT = 1
_BUSY_TIMEOUT_S = 5.0
_NOT_DAMAGE = ("locked", "unable to open", "disk i/o", "readonly", "full")
"""Texts of SQLite's errors about a file that may be all right."""
_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    task_id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    num_starts INTEGER NOT NULL DEFAULT 0,
    message BLOB NOT NULL
)
"""
_ADD = """
INSERT INTO jobs (task_id, name, message) VALUES (?, ?, ?) ON CONFLICT (task_id) DO UPDATE SET name = excluded.name, message = excluded.message
"""


class StoreError(RequestError):
    """A job could not be written down, so it was not accepted."""

    status = 507
    retry_after_s = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptJob:
    """A job of an earlier run. `num_starts`: how many runs began it and did not end it."""

    task_id: str
    name: str
    num_starts: int
    message: bytes


class JobStore:
    """The file `path`. Thread-safe; one process at a time."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the folder cannot be written, or another server has the file."""
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = self._open_or_set_aside()

    def add(self, task_id: str, name: str, message: bytes) -> None:
        """Write a job down, on the disk itself. The same task again replaces what was there. Raises StoreError."""

        def write() -> None:
            self._connection.execute(_ADD, (task_id, name, message))

        try:
            self._do(write)
        except sqlite3.Error as error:
            raise StoreError(
                f"The job was not accepted: {self.path} cannot be written ({error}). Free some space on its disk, then try again."
            ) from error

    def remove(self, task_id: str) -> None:
        """The job has ended. A failure is logged: the job then runs once more after the next start, which does no harm but work."""
        try:
            self._do(lambda: self._connection.execute("DELETE FROM jobs WHERE task_id = ?", (task_id,)))
        except sqlite3.Error as error:
            log.warning("%s cannot be written (%s): %s would run again after a restart.", self.path, error, task_id)

    def note_start(self, task_id: str) -> None:
        """The job begins to run. A failure is logged; it costs a limit on how often a job may end the front, not the job."""
        try:
            self._do(lambda: self._connection.execute("UPDATE jobs SET num_starts = num_starts + 1 WHERE task_id = ?", (task_id,)))
        except sqlite3.Error as error:
            log.warning("%s cannot be written (%s).", self.path, error)

    def read_all(self) -> list[KeptJob]:
        """The jobs that have not ended, oldest first."""

        def read() -> list[KeptJob]:
            rows = self._connection.execute("SELECT task_id, name, num_starts, message FROM jobs ORDER BY number").fetchall()
            return [KeptJob(task_id=str(row[0]), name=str(row[1]), num_starts=int(row[2]), message=bytes(row[3])) for row in rows]

        try:
            return self._do(read)
        except (sqlite3.Error, TypeError, ValueError) as error:
            log.error("%s cannot be read (%s).", self.path, error)
            self._start_over()
            return []

    def __len__(self) -> int:
        number: int = self._do(lambda: self._connection.execute("SELECT COUNT(*) FROM jobs").fetchone()[0])
        return number

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _do(self, work: Callable[[], ResultT]) -> ResultT:
        with self._lock, self._connection:  # commits, or rolls back on an error
            return work()

    def _open_or_set_aside(self) -> sqlite3.Connection:
        try:
            return self._open()
        except sqlite3.DatabaseError as error:
            if any(text in str(error).lower() for text in _NOT_DAMAGE):
                raise OSError(f"{self.path}: {error}; is another server running on this data folder?") from error
            log.error("%s cannot be read (%s).", self.path, error)
            self._set_aside()
            return self._open()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # a second front would make the jobs of the first again
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            layout = connection.execute("PRAGMA user_version").fetchone()[0]
            if layout not in (0, _LAYOUT):
                raise sqlite3.DatabaseError(f"it was written by another version of this program (layout {layout}, not {_LAYOUT})")
            if connection.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("its contents are damaged")
            connection.execute(_TABLE)
            connection.execute("SELECT task_id, name, num_starts, message FROM jobs LIMIT 1").fetchall()
            connection.execute(f"PRAGMA user_version = {_LAYOUT}")
            connection.commit()
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _start_over(self) -> None:
        with self._lock:
            self._connection.close()
            self._set_aside()
            self._connection = self._open()

    def _set_aside(self) -> None:
        """Rename the file and what SQLite keeps next to it, so that nothing of it is lost."""
        number = next(number for number in range(1, 10_000) if not self._aside(number, "").exists())
        for suffix in ("-wal", "-shm", ""):
            part = self.path.with_name(self.path.name + suffix)
            if part.exists():
                part.replace(self._aside(number, suffix))
        log.error(
            "It was renamed to %s; jobs that waited in it are lost unless you repair it with the sqlite3 program.", self._aside(number, "").name
        )

    def _aside(self, number: int, suffix: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.damaged-{number}{self.path.suffix}{suffix}")
