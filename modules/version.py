"""The program's version, as pictures carry it. Without a leading "v", which would be read as A1111's."""

from __future__ import annotations

VERSION = "0.1.0"


def program_version() -> str:
    return VERSION
