"""The campaign's short form: some mutated files for each reader, and that the campaign sees what is not ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tools.campaign.file_fuzz import MAX_GROWTH_MIB, READERS, Outcome, report_lines, run_reader


@pytest.mark.parametrize("name", READERS)
def test_mutated_files_are_read_or_refused_by_an_error_of_ours(name: str, tmp_path: Path) -> None:
    outcome = run_reader(READERS[name], tmp_path, cases=80, seed=11)
    assert outcome.failures == []
    assert outcome.read + outcome.refused == 80
    assert outcome.growth_mib < MAX_GROWTH_MIB


def test_anything_else_counts_as_a_failure(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise KeyError("not ours")

    outcome = run_reader(replace(READERS["JSON"], read=fail), tmp_path, cases=3, seed=0)
    assert [case for case, _ in outcome.failures] == [0, 1, 2]
    assert any("not ours" in line for line in report_lines({"JSON": outcome, "died": "ended with -11"}, cases=3, seed=0))


@pytest.mark.parametrize("name", READERS)
def test_the_good_files_that_cases_are_made_of_are_read(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    for seed in reader.seeds():
        path = tmp_path / f"good{reader.suffix}"
        path.write_bytes(seed)
        reader.read(path)
    assert Outcome().cases == 0
