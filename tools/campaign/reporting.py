"""A campaign's report as a Markdown file under benchmarks/, and the run of a campaign that goes through plans."""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.campaign.guided_job import PLANS
from tools.campaign.progress import Progress

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


@dataclass(frozen=True, kw_only=True)
class PlanCampaign:
    """A campaign of jobs under each plan. `run_plan(plan, number, progress)` records its cases in `progress`; `summarize` gives a row per plan."""

    name: str
    question: str
    command: str
    run_plan: Callable[[str, int, Progress], object]
    summarize: Callable[[Progress], list[dict[str, object]]]


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `run_plans` reads."""
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--progress", type=Path, help="a file that records finished cases; the next run resumes from it")
    parser.add_argument("--report-folder", type=Path, default=BENCHMARKS)


def run_plans(campaign: PlanCampaign, chosen: argparse.Namespace, number: int) -> int:
    """Divide `number` among the chosen plans; the report is written after each. Returns the exit code, 1 if any promise was broken."""
    logging.disable(logging.CRITICAL)  # every failed job would log a lot
    progress = Progress(chosen.progress)
    for plan in chosen.plans:
        campaign.run_plan(plan, max(1, number // len(chosen.plans)), progress)
        report = Report(
            name=campaign.name,
            question=campaign.question,
            command=f"{campaign.command} --plans {' '.join(chosen.plans)}",
            rows=campaign.summarize(progress),
            found=progress.found,
            seconds=progress.seconds,
            commits=progress.commits,
        )
        path = write_report(report, chosen.report_folder)
    sys.stdout.write(path.read_text(encoding="utf-8"))
    return 1 if progress.found else 0
