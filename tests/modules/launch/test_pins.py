"""Pins, constraints and what pip says of a refusal, without pip."""

from __future__ import annotations

from pathlib import Path

import pytest

from modules.launch import pins as launch_pins
from modules.launch import pip as launch_pip
from modules.launch.pins import (
    Refusal,
    companions_of_torch,
    constraints,
    differing,
    find_refusals,
    leave_out,
    misfits_of_torch,
    names_a_requirement,
    read_pins,
)

CONFLICT = """
ERROR: Cannot install foo==1.0 and foo==1.1 because these package versions have conflicting dependencies.

The conflict is caused by:
    foo 1.1 depends on tiny[extra]>=2
    foo 1.0 depends on Tiny>=2; python_version > "3"
    The user requested (constraint) tiny==1.0

To fix this you could try to:
1. loosen the range of package versions you've specified
"""


def test_pins_are_those_lines_that_hold_for_this_python() -> None:
    text = """
    # a list
    torch==2.13.0
    numpy == 2.4.6 ; python_version >= "3.10"  # newer
    numpy==2.2.6; python_version < "3.10"
    tiny>=1
    other==1; sys_platform == "win32"
    """
    assert read_pins(text) == {"torch": "2.13.0", "numpy": "2.4.6"}


@pytest.mark.parametrize(
    ("torch", "torchvision"),
    [("2.13.0+cpu", "0.28.0+cpu"), ("2.9.1", "0.24.1"), ("2.5.1+cu124", "0.20.1+cu124"), ("3.0.0", None), (None, None), ("2.14.0.dev1", None)],
)
def test_the_torchvision_that_goes_with_a_torch(torch: str | None, torchvision: str | None) -> None:
    assert companions_of_torch(torch).get("torchvision") == torchvision


def test_what_is_installed_is_held_at_its_pin_and_torch_at_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_pip, "installed_version", {"torch": "2.13.0+cpu", "tiny": "2.0", "torchvision": "0.28.0"}.get)
    pins = {"torch": "2.13.0", "tiny": "1.0", "absent": "4"}
    assert constraints(pins) == ["torch==2.13.0+cpu", "torchvision==0.28.0+cpu", "torchaudio==2.13.0+cpu", "tiny==1.0"]
    assert differing(pins) == {"tiny": "2.0", "absent": None}
    assert misfits_of_torch() == {"torchvision": "0.28.0"}


def test_a_refusal_is_read_from_what_pip_prints_and_from_its_log() -> None:
    wanted = [Refusal("tiny", "1.0", "tiny[extra]>=2", "foo 1.1"), Refusal("tiny", "1.0", 'Tiny>=2; python_version > "3"', "foo 1.0")]
    assert find_refusals(CONFLICT) == wanted
    assert find_refusals("".join(f"2026-11-29T07:30:14,530 {line}\n" for line in CONFLICT.splitlines())) == wanted
    assert str(wanted[0]) == "refused: foo 1.1, which needs tiny[extra]>=2. The program runs with tiny 1.0 and keeps it"
    assert find_refusals("ERROR: No matching distribution found for tiny") == []


def test_only_what_was_refused_is_left_out(tmp_path: Path) -> None:
    refusals = find_refusals(CONFLICT)
    assert leave_out(["install", "-U", "Foo>1", "bar"], refusals, tmp_path) == ["install", "-U", "bar"]
    requirements = tmp_path / "its list.txt"
    requirements.write_text("foo\nbar\n")
    copies = tmp_path / "copies"
    copies.mkdir()
    words = leave_out(["install", "-r", str(requirements)], refusals, copies)
    assert Path(words[2]).parent == copies and Path(words[2]).read_text() == "bar\n"
    assert requirements.read_text() == "foo\nbar\n"
    assert leave_out(words, refusals, copies) == words
    assert leave_out(["install", "-r", "nowhere.txt"], refusals, copies) == ["install", "-r", "nowhere.txt"]
    assert not names_a_requirement(["install", "-U"])
    assert names_a_requirement(["install", "-r", "x"])


def test_unknown_versions_are_never_companions() -> None:
    assert launch_pins.companions_of_torch("nonsense") == {}
