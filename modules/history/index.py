"""The table of pictures, in SQLite: path, time, size, infotext, star. Searches words of infotexts and paths.

A picture's id is its time in microseconds (moved on where two are equal), so the order of ids is the order of time, and every search can walk the
table from its newest end and stop after one page. Must not know how files are read or deleted.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MAX_WORDS = 24
MAX_QUERY_CHARACTERS = 1000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS pictures (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, folder TEXT NOT NULL, mtime_ns INTEGER NOT NULL, num_bytes INTEGER NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, infotext TEXT NOT NULL, star INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS pictures_folder ON pictures (folder, id);
CREATE INDEX IF NOT EXISTS pictures_star ON pictures (id) WHERE star;
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5 (infotext, path, marks, content='', tokenize="unicode61 remove_diacritics 2");
CREATE TABLE IF NOT EXISTS stars (path TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS folders (path TEXT PRIMARY KEY, mtime_ns INTEGER NOT NULL);
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureFacts:
    """One file: `path` with slashes, relative to the outputs folder; `infotext` empty without one."""

    path: str
    mtime_ns: int
    num_bytes: int
    width: int
    height: int
    infotext: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A row of the table."""

    id: int
    path: str
    mtime_ns: int
    num_bytes: int
    width: int
    height: int
    infotext: str
    star: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is looked for: pictures in the main folder `folder` with every word of `text` in infotext or path.

    A word may be the beginning of one; -word must not occur."""

    text: str = ""
    folder: str = ""
    only_stars: bool = False
    oldest_first: bool = False


def match_expression(text: str) -> str:
    """`text` as a search expression of SQLite: "red cat -dog" -> '"red"* AND "cat"* NOT "dog"*'. Empty for nothing to look for.

    Words in quotation marks stay together. Nothing that is typed can be an operator.
    """
    wanted: list[str] = []
    unwanted: list[str] = []
    for minus, phrase, word in re.findall(r'(-?)(?:"([^"]*)"|(\S+))', text[:MAX_QUERY_CHARACTERS])[:MAX_WORDS]:
        parts = re.findall(r"\w+", (phrase or word).replace("_", " "))
        if parts:
            (unwanted if minus else wanted).append(f'"{" ".join(parts)}"*')
    if not wanted:
        return ""
    return " NOT ".join([" AND ".join(wanted), *unwanted])


class HistoryIndex:
    """The table in `file`. A file that is damaged or of another version is rebuilt; stars are lost then. Thread-safe."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The connection, as one transaction."""
        with self._lock:
            if self._connection is None:
                self._connection = self._connect()
            with self._connection:
                yield self._connection

    def _connect(self) -> sqlite3.Connection:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self._prepared()
        except sqlite3.DatabaseError as error:
            log.warning("%s is damaged (%s); the list of pictures is rebuilt.", self.file, error)
            broken = self.file.with_suffix(".damaged")
            self.file.replace(broken)
            return self._prepared()

    def _prepared(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.file, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA_VERSION):
                raise sqlite3.DatabaseError(f"it has version {version}, this program writes {SCHEMA_VERSION}")
            connection.executescript(_SCHEMA)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    # ---- writing ----

    def put(self, pictures: Iterable[PictureFacts]) -> None:
        """Add pictures, or replace what is known of them."""
        with self._open() as db:
            for facts in sorted(pictures, key=lambda one: one.mtime_ns):
                self._forget(db, facts.path)
                number = self._free_id(db, facts.mtime_ns // 1000)
                has_star = db.execute("SELECT 1 FROM stars WHERE path = ?", (facts.path,)).fetchone() is not None
                row = (number, facts.path, main_folder(facts.path), facts.mtime_ns, facts.num_bytes, facts.width, facts.height, facts.infotext)
                db.execute("INSERT INTO pictures VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, has_star))
                db.execute(
                    "INSERT INTO words (rowid, infotext, path, marks) VALUES (?, ?, ?, ?)", (number, *_words(facts.infotext, facts.path, has_star))
                )

    @staticmethod
    def _free_id(db: sqlite3.Connection, number: int) -> int:
        while db.execute("SELECT 1 FROM pictures WHERE id = ?", (number,)).fetchone() is not None:
            number += 1
        return number

    @staticmethod
    def _forget(db: sqlite3.Connection, path: str) -> None:
        row = db.execute("SELECT id, infotext, star FROM pictures WHERE path = ?", (path,)).fetchone()
        if row is not None:
            db.execute(_FORGET_WORDS, (row[0], *_words(row[1], path, row[2])))
            db.execute("DELETE FROM pictures WHERE id = ?", (row[0],))

    def forget(self, paths: Iterable[str]) -> None:
        """Take pictures out of the table. Their stars are kept for the case that they come back."""
        with self._open() as db:
            for path in paths:
                self._forget(db, path)

    def set_star(self, number: int, star: bool) -> None:
        with self._open() as db:
            row = db.execute("SELECT infotext, path, star FROM pictures WHERE id = ?", (number,)).fetchone()
            if row is None:
                return
            db.execute(_FORGET_WORDS, (number, *_words(*row)))
            db.execute("INSERT INTO words (rowid, infotext, path, marks) VALUES (?, ?, ?, ?)", (number, *_words(row[0], row[1], star)))
            db.execute("UPDATE pictures SET star = ? WHERE id = ?", (star, number))
            db.execute("INSERT OR IGNORE INTO stars VALUES (?)" if star else "DELETE FROM stars WHERE path = ?", (row[1],))

    # ---- reading ----

    def find(self, number: int) -> Picture | None:
        with self._open() as db:
            row = db.execute(f"SELECT {_COLUMNS} FROM pictures WHERE id = ?", (number,)).fetchone()
        return None if row is None else _picture(row)

    def page(self, question: Question, offset: int, count: int) -> list[Picture]:
        """`count` pictures from place `offset`, newest first unless the question says otherwise."""
        source, values = _source(question)
        order = "ASC" if question.oldest_first else "DESC"
        with self._open() as db:
            rows = db.execute(f"SELECT number FROM ({source}) ORDER BY number {order} LIMIT ? OFFSET ?", (*values, count, offset)).fetchall()
            found = [db.execute(f"SELECT {_COLUMNS} FROM pictures WHERE id = ?", row).fetchone() for row in rows]
        return [_picture(row) for row in found if row is not None]

    def count(self, question: Question) -> int:
        source, values = _source(question)
        with self._open() as db:
            (number,) = db.execute(f"SELECT count(*) FROM ({source})", values).fetchone()
        return int(number)

    def main_folders(self) -> list[str]:
        """The first parts of all paths."""
        with self._open() as db:
            return [str(row[0]) for row in db.execute(_FOLDERS)]

    def known_files(self, folder: str) -> dict[str, tuple[int, int]]:
        """(time in ns, bytes) of the pictures directly in `folder` (with slashes, empty for the outputs folder itself), by path."""
        begin = f"{folder}/" if folder else ""
        with self._open() as db:
            rows = db.execute("SELECT path, mtime_ns, num_bytes FROM pictures WHERE path >= ? AND path < ?", (begin, f"{begin}\U0010ffff")).fetchall()
        return {path: (mtime_ns, num_bytes) for path, mtime_ns, num_bytes in rows if "/" not in path[len(begin) :]}

    def folders(self) -> dict[str, int]:
        """Folders that were listed, with their time in ns then."""
        with self._open() as db:
            return dict(db.execute("SELECT path, mtime_ns FROM folders").fetchall())

    def put_folder(self, path: str, mtime_ns: int) -> None:
        with self._open() as db:
            db.execute("INSERT OR REPLACE INTO folders VALUES (?, ?)", (path, mtime_ns))

    def forget_folder(self, path: str) -> None:
        """Take a folder that is gone, and the pictures directly in it, out of the table."""
        self.forget(self.known_files(path))
        with self._open() as db:
            db.execute("DELETE FROM folders WHERE path = ?", (path,))


_FORGET_WORDS = "INSERT INTO words (words, rowid, infotext, path, marks) VALUES ('delete', ?, ?, ?, ?)"
_FOLDERS = """
WITH RECURSIVE found (folder) AS (
    SELECT min(folder) FROM pictures UNION ALL
    SELECT (SELECT min(folder) FROM pictures WHERE folder > found.folder) FROM found WHERE folder IS NOT NULL
) SELECT folder FROM found WHERE folder IS NOT NULL
"""
"""Jumps from folder to folder in their index instead of reading all of it."""
_STAR_MARK = "star"
_COLUMNS = "id, path, mtime_ns, num_bytes, width, height, infotext, star"


def _picture(row: Sequence[object]) -> Picture:
    number, path, mtime_ns, num_bytes, width, height, infotext, star = row
    return Picture(
        id=int(str(number)), path=str(path), mtime_ns=int(str(mtime_ns)), num_bytes=int(str(num_bytes)), width=int(str(width)),
        height=int(str(height)), infotext=str(infotext), star=bool(star),
    )  # fmt: skip


def _source(question: Question) -> tuple[str, list[object]]:
    """A query for the ids (column `number`) that the question asks for, with its values.

    Words, star and folder together are looked up in the index of words, where all three are words."""
    match = match_expression(question.text)
    marks = [_STAR_MARK] if question.only_stars else []
    if not match and not (marks and question.folder):
        if question.folder:
            return "SELECT id AS number FROM pictures WHERE folder = ?", [question.folder]
        return f"SELECT id AS number FROM pictures{' WHERE star' if marks else ''}", []
    marks += [_folder_mark(question.folder)] if question.folder else []
    parts = [*([f"{{infotext path}} : ({match})"] if match else []), *(f'marks : "{mark}"' for mark in marks)]
    return "SELECT rowid AS number FROM words WHERE words MATCH ?", [" AND ".join(parts)]


def main_folder(path: str) -> str:
    """The first folder of a path; empty for a file directly in the outputs folder."""
    return path.partition("/")[0] if "/" in path else ""


def _folder_mark(folder: str) -> str:
    """A word that only pictures of this folder have."""
    return f"in{folder.encode().hex()}"


def _words(infotext: str, path: str, star: object) -> tuple[str, str, str]:
    """What the index of words holds of a picture: infotext, path, and the marks for its folder and star."""
    marks = [_folder_mark(main_folder(path)), *([_STAR_MARK] if star else [])]
    return infotext, path.replace("_", " "), " ".join(marks)
