"""The section of a document that a command writes, between two marks; everything around it is written by people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

END = "<!-- end of what is measured -->"


def write_measured(path: Path, lines: Sequence[str], *, command: str) -> None:
    """Replace the text between the mark of `command` and the end mark."""
    begin = f"<!-- measured by python -m {command} -->"
    before, rest = path.read_text(encoding="utf-8").split(begin, 1)
    after = rest.split(END, 1)[1]
    path.write_text(before + "\n".join([begin, "", *lines, "", END]) + after, encoding="utf-8")
