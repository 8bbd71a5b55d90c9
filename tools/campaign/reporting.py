"""A campaign's report as a Markdown file under benchmarks/."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def write_report(name: str, *, question: str, command: str, rows: Sequence[Mapping[str, object]], found: Sequence[str], seconds: float) -> Path:
    """One table row for each part of the campaign; `found` are its findings, word for word. Returns the file."""
    columns = list(rows[0])
    machine = f"{platform.machine()}, {platform.system()}"
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    facts = [f"- command: `{command}`", f"- time: {seconds:.0f} s", f"- machine: {machine}", f"- versions: {versions}"]
    table = [_line(columns), f"|{' --- |' * len(columns)}", *(_line([row[column] for column in columns]) for row in rows)]
    lines = [f"# {name}", "", question, "", *facts, "", *table, "", "## Found", "", *(f"- {text}" for text in found or ["Nothing."]), ""]
    path = BENCHMARKS / f"campaign_{name}.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
