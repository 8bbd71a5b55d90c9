"""docs/compatibility.md refers to existing tests, and lists every flag and setting without effect."""

from __future__ import annotations

import re
from pathlib import Path

from backend.sampling.registry import SAMPLERS
from tools.unread_settings import effectless_tables

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
STATES = ("works", "differs", "left out", "left out for now")


def rows() -> list[list[str]]:
    """The cells of every row in the tables of entries."""
    lines = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| entry")]
    return [cells for line in lines if len(cells := [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]) == 4]


def test_every_entry_has_a_state_and_every_difference_a_reason() -> None:
    assert len(rows()) > 70
    for entry, state, reason, _ in rows():
        assert state in STATES, entry
        assert state == "works" or reason, f"{entry}: why?"


def test_the_tests_it_names_exist() -> None:
    files = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "modules").rglob("*.py")]
    known = {path.name for path in files} | {f"{path.parent.name}/{path.name}" for path in files}
    named = {name.strip() for *_, held_by in rows() for name in held_by.split(",") if name.strip()}
    for name in named:
        pattern = re.compile(re.escape(name).replace(r"\*", ".*"))
        assert any(pattern.fullmatch(file) for file in known), name


def test_everything_without_effect_is_listed_with_the_truth() -> None:
    assert "\n".join(effectless_tables()) in TEXT, "run python -m tools.unread_settings --write"


def test_the_number_of_samplers_is_right() -> None:
    assert f"{len(SAMPLERS)} samplers by name" in TEXT
