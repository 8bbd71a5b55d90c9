"""Every test that docs/faults.md names is there."""

from __future__ import annotations

import re

from tests.contract.sources import ROOT_DIR


def test_the_table_of_faults_names_tests_that_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT_DIR / "docs" / "faults.md").read_text(encoding="utf-8")))
    sources = (path.read_text(encoding="utf-8") for path in (ROOT_DIR / "tests").rglob("test_*.py"))
    there = {name for text in sources for name in re.findall(r"def (test_\w+)\(", text)}
    assert len(named) > 60
    assert sorted(named - there) == [], "docs/faults.md names tests that were renamed or removed"
