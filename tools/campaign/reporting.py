"""A campaign's report as a Markdown file under benchmarks/."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@dataclass(frozen=True, kw_only=True)
class Report:
    """A campaign's name, question, command and results: a table row per part, and its findings verbatim."""

    name: str
    question: str
    command: str
    rows: Sequence[Mapping[str, object]]
    found: Sequence[str]
    seconds: float
    commits: Sequence[str] = ()


def write_report(report: Report, folder: Path = BENCHMARKS) -> Path:
    """Write or replace the report. Returns the file."""
    columns = list(report.rows[0])
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    facts = [f"- command: `{report.command}`", f"- time: {report.seconds:.0f} s", f"- machine: {platform.machine()}, {platform.system()}"]
    facts += [f"- versions: {versions}", *([f"- commits: {', '.join(report.commits)}"] if report.commits else [])]
    table = [_line(columns), f"|{' --- |' * len(columns)}", *(_line([row[column] for column in columns]) for row in report.rows)]
    found = [f"- {text}" for text in report.found or ["Nothing."]]
    lines = [f"# {report.name}", "", report.question, "", *facts, "", *table, "", "## Found", "", *found, ""]
    path = folder / f"campaign_{report.name}.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
