"""The checks for a real GPU, rehearsed on the CPU: they run, a failing one does not affect others, and the report contains the findings."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.cuda_checks.__main__ import main
from tools.cuda_checks.catalogue import CHECKS, choose_checks
from tools.cuda_checks.machine import Machine, difference
from tools.cuda_checks.runner import Check, Report, read_results, run_checks

Run = Callable[[Any, Report], None]


def _run(folder: Path, *runs: Run, isolated: str = "fork", limit_s: float = 20.0) -> list[dict[str, Any]]:
    machine = Machine(kind="cpu", tiny=True, shared_dir=folder, out_dir=folder)
    checks = [Check(run.__name__, 5, "A question?", run, limit_s) for run in runs]
    run_checks(checks, machine, folder, total_s=60, isolated=isolated)
    return read_results(folder)


def good(machine: Machine, report: Report) -> None:
    report.expect("two are two", 2 == 2, apart=0.0)


def raising(machine: Machine, report: Report) -> None:
    report.value("before", number=1)
    raise ValueError("made up")


def dying(machine: Machine, report: Report) -> None:
    os._exit(7)


def hanging(machine: Machine, report: Report) -> None:
    while True:
        time.sleep(1)


def test_a_bad_check_spoils_no_other(tmp_path: Path) -> None:
    results = _run(tmp_path, raising, dying, good)
    endings = {entry["check"]: (entry["name"], entry["detail"]) for entry in results if entry["kind"] == "ending"}
    assert [name for name, _ in endings.values()] == ["raised", "died", "done"]
    assert "ValueError: made up" in endings["raising"][1]
    assert {"check": "raising", "kind": "value", "name": "before", "values": {"number": 1}} in results
    text = (tmp_path / "report.md").read_text()
    assert "ValueError: made up" in text
    assert "holds: two are two: apart 0" in text


def test_a_check_that_hangs_is_stopped(tmp_path: Path) -> None:
    assert [entry["name"] for entry in _run(tmp_path, hanging, limit_s=0.5)] == ["too slow"]


def test_what_does_not_hold_is_counted(tmp_path: Path) -> None:
    def wrong(machine: Machine, report: Report) -> None:
        report.expect("one is two", False)

    machine = Machine(kind="cpu", tiny=True, shared_dir=tmp_path, out_dir=tmp_path)
    assert run_checks([Check("wrong", 5, "?", wrong, 9)], machine, tmp_path, total_s=60, isolated="none") == 1
    assert "DOES NOT HOLD: **one is two" in (tmp_path / "report.md").read_text()


def test_the_tiny_checks_run_on_the_cpu(tmp_path: Path) -> None:
    assert (
        main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--only", "machine", "free_memory", "split", "tiles", "flux_tiles", "links"]) == 0
    )
    found = {(entry["check"], entry["name"]) for entry in read_results(tmp_path) if entry["kind"] == "expect" and entry["holds"]}
    assert sum(check == "split" for check, _ in found) == 8, "two plans, with and without streams: bit-equal, and the same every time"
    for name in ("tiles", "flux_tiles"):
        assert sum(check == name for check, _ in found) == 5, "even and uneven: near the whole, and the same every time; displaced: near the whole"


def test_names_of_checks() -> None:
    assert [check.name for check in choose_checks(["sdxl", "machine"], ["sdxl"])] == ["machine"]
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    with pytest.raises(SystemExit, match="nonsense: no such check"):
        choose_checks(["nonsense"], [])


def test_differences_are_told_in_numbers() -> None:
    assert json.loads(json.dumps(difference([1.0, 2.0], [1.0, 2.0])))["equal"] is True
    assert difference([1.0, 2.5], [1.0, 2.0])["max"] == 0.5
