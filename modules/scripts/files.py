"""Types for files of extensions."""

from __future__ import annotations

from typing import NamedTuple


class ScriptFile(NamedTuple):
    """A file of an extension: the extension's folder, the file name, the path."""

    basedir: str
    filename: str
    path: str


class ScriptClassData(NamedTuple):
    """A script class, with the file and the extension it came from."""

    script_class: type
    path: str
    basedir: str
    module: object
