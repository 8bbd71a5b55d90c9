"""Files that extensions bring, as others pass them on."""

from __future__ import annotations

from typing import NamedTuple


class ScriptFile(NamedTuple):
    """A file of an extension: the extension's folder, the file's name, its path."""

    basedir: str
    filename: str
    path: str


class ScriptClassData(NamedTuple):
    """A script class, with the file and the extension it came from."""

    script_class: type
    path: str
    basedir: str
    module: object
