"""Short version of the campaign: some mutated files per reader, and that it notices errors that are not ours."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tools.campaign.file_fuzz import MAX_GROWTH_MIB, READERS, Outcome, report_lines, run_reader
from tools.development import ROOT_DIR


@pytest.mark.parametrize("name", READERS)
def test_mutated_files_are_read_or_refused_by_an_error_of_ours(name: str, tmp_path: Path) -> None:
    outcome = run_reader(READERS[name], tmp_path, cases=80, seed=11)
    assert outcome.failures == []
    assert outcome.read + outcome.refused == outcome.cases >= 80 // READERS[name].one_of
    assert outcome.growth_mib < MAX_GROWTH_MIB


def test_anything_else_counts_as_a_failure(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise KeyError("not ours")

    outcome = run_reader(replace(READERS["JSON"], read=fail), tmp_path, cases=3, seed=0)
    assert [case for case, _ in outcome.failures] == [0, 1, 2]
    assert any("not ours" in line for line in report_lines({"JSON": outcome, "died": "ended with -11"}, cases=3, seed=0))


def test_a_case_that_hangs_is_a_finding_and_the_next_go_on(tmp_path: Path) -> None:
    def hang(_: Path) -> None:
        while True:
            pass

    outcome = run_reader(replace(READERS["JSON"], read=hang), tmp_path, cases=2, seed=0, limit_s=0.05)
    assert outcome.failures == [(case, "Hang: broken off after 0.05 s") for case in (0, 1)]


def test_a_library_that_does_not_come_back_ends_its_process_and_says_where(tmp_path: Path) -> None:
    program = (
        "import signal\n"
        "from tools.campaign.file_fuzz import within\n"
        "def deaf():\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
        "    while True: pass\n"
        "with within(0.05, isolated=True): deaf()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT_DIR, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Timeout")
    assert "in deaf" in done.stderr


@pytest.mark.parametrize("name", READERS)
def test_the_good_files_that_cases_are_made_of_are_read(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    for seed in reader.seeds():
        path = tmp_path / f"good{reader.suffix}"
        path.write_bytes(seed)
        if reader.finish is not None:
            reader.finish(path)
        reader.read(path)
    assert Outcome().cases == 0
