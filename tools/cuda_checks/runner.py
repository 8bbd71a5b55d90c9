"""Runs checks one after another, each in its own process with a time limit, and records findings immediately.

A check that raises, hangs or dies is recorded, and the next one starts. Knows no devices; importing it does not import torch.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS, REPORT, CONSOLE = "results.jsonl", "report.md", "console.log"
_POLL_S = 0.2
_NO_CARD_AFTER_FORK = ("re-initialize CUDA in forked", "initialization error", "CUDA driver initialization", "CUDA unknown error")


@dataclass(frozen=True, slots=True)
class Check:
    """One question about a machine. `run(machine, report)` answers it through the report, within `limit_s`."""

    name: str
    issue: int
    question: str
    run: Callable[[Any, Report], None]
    limit_s: float


class Report:
    """Findings of one check, one JSON line each, written immediately."""

    def __init__(self, folder: Path, check: str) -> None:
        self.folder, self._check = folder, check

    def value(self, name: str, **numbers: Any) -> None:
        """A finding without a verdict."""
        self._write({"kind": "value", "name": name, "values": numbers})

    def expect(self, name: str, holds: object, **numbers: Any) -> None:
        """An expectation; if it does not hold, the check continues."""
        self._write({"kind": "expect", "name": name, "holds": bool(holds), "values": numbers})

    def ending(self, outcome: str, seconds: float, detail: str = "") -> None:
        self._write({"kind": "ending", "name": outcome, "seconds": round(seconds, 2), "detail": detail})

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps({"check": self._check, **entry}, default=str)
        with (self.folder / RESULTS).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
        print(line, flush=True)


def run_checks(checks: Sequence[Check], machine: Any, folder: Path, *, total_s: float, patience: float = 1.0, isolated: str = "fork") -> int:
    """Run `checks` in order until `total_s` is used up; returns the number that did not complete normally.

    `isolated`: "fork" (shares what is already imported), or "none" for a debugger. A process that cannot use its GPU after a fork is repeated in a
    newly started one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    began_s, num_bad = time.monotonic(), 0
    for check in checks:
        left_s = total_s - (time.monotonic() - began_s)
        report = Report(folder, check.name)
        if left_s < min(check.limit_s, 5):
            report.ending("left out", 0.0, "the time of all checks together is spent")
        elif isolated == "none":
            _do(check, machine, report)
        else:
            _run_in_child(check, machine, report, min(check.limit_s * patience, left_s), isolated)
            if isolated == "fork" and _lost_card_by_fork(folder, check.name):
                isolated = "spawn"
                _run_in_child(check, machine, report, min(check.limit_s * patience, left_s), isolated)
        num_bad += _ended_badly(folder, check.name)
        write_report(folder, checks)
    return num_bad


def _run_in_child(check: Check, machine: Any, report: Report, limit_s: float, method: str) -> None:
    began_s = time.monotonic()
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=_do_in_child, args=(check, machine, report))
    process.start()
    process.join(limit_s)
    if process.is_alive():
        _kill_group(process)
        report.ending("too slow", time.monotonic() - began_s, f"stopped after {limit_s:.0f} s")
    elif process.exitcode:
        report.ending("died", time.monotonic() - began_s, f"exit code {process.exitcode}; see {CONSOLE}")


def _kill_group(process: Any) -> None:
    """Kill the check and the processes it started, which share a process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join(10)


def _do_in_child(check: Check, machine: Any, report: Report) -> None:
    os.setpgrp()
    with (report.folder / CONSOLE).open("a", encoding="utf-8") as console:
        print(f"=== {check.name}", file=console, flush=True)
        os.dup2(console.fileno(), sys.stderr.fileno())
        logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d ms %(levelname)s %(message)s")
        _do(check, machine, report)
    sys.stdout.flush()
    os._exit(0)  # threads and device teardown must not delay the next check


def _do(check: Check, machine: Any, report: Report) -> None:
    began_s = time.monotonic()
    try:
        with machine.working(check.name):
            check.run(machine, report)
    except Exception:  # noqa: BLE001 - any exception in a check is its finding
        report.ending("raised", time.monotonic() - began_s, traceback.format_exc())
    else:
        report.ending("done", time.monotonic() - began_s)


def read_results(folder: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (folder / RESULTS).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []


def _lost_card_by_fork(folder: Path, name: str) -> bool:
    endings = [entry for entry in read_results(folder) if entry["check"] == name and entry["kind"] == "ending"]
    return bool(endings) and any(mark in endings[-1]["detail"] for mark in _NO_CARD_AFTER_FORK)


def _ended_badly(folder: Path, name: str) -> bool:
    entries = [entry for entry in read_results(folder) if entry["check"] == name]
    endings = [entry for entry in entries if entry["kind"] == "ending"]
    failed = any(not entry.get("holds", True) for entry in entries)
    return failed or not endings or endings[-1]["name"] != "done"


def write_report(folder: Path, checks: Sequence[Check]) -> None:
    """report.md: the findings of each check, failed expectations first."""
    results = read_results(folder)
    lines = ["# Checks on a card", ""]
    for check in checks:
        entries = [entry for entry in results if entry["check"] == check.name]
        if entries:
            lines += [f"## {check.name} (issue {check.issue})", "", check.question, "", *_lines(entries), ""]
    (folder / REPORT).write_text("\n".join(lines), encoding="utf-8")


def _lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in entries:
        if entry["kind"] == "ending":
            lines.append(f"- {entry['name']} in {entry['seconds']} s")
            lines += ["", "```", entry["detail"].rstrip(), "```"] if entry["detail"] else []
            continue
        mark = {True: "holds: ", False: "**DOES NOT HOLD: **"}[entry["holds"]] if entry["kind"] == "expect" else ""
        values = ", ".join(f"{name} {_text(value)}" for name, value in entry["values"].items())
        lines.append(f"- {mark}{entry['name']}{': ' if values else ''}{values}")
    return lines


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
