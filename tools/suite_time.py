"""Where the test suite spends its time, by folder: `python -m tools.suite_time BEFORE.xml AFTER.xml` prints a Markdown table.

The files are pytest's own: `python tools/test --junitxml AFTER.xml`. One file gives the table of one run. The seconds are processor seconds
(tests/support/cpu_times.py), the fair measure on a machine that does other things too. `--wall` prints wall seconds, `--files` a row per file and
`--tests N` the N most expensive tests of the last file.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

BEFORE = "imports and collection"
WHOLE = "whole run"
Times = dict[str, tuple[int, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One test of a run. `cpu_before_s` is what its process had used before its first test, else 0."""

    file: str
    name: str
    wall_s: float
    cpu_s: float
    cpu_before_s: float


def read_cases(path: Path) -> list[Case]:
    return [_case(element) for element in ElementTree.parse(path).getroot().iter("testcase")]


def _case(element: ElementTree.Element) -> Case:
    noted = {item.attrib["name"]: float(item.attrib["value"]) for item in element.iter("property") if item.attrib["name"].startswith("cpu_")}
    return Case(
        file="/".join(part for part in element.get("classname", "").split(".") if not part[:1].isupper()),
        name=element.get("name", ""),
        wall_s=float(element.get("time", 0.0)),
        cpu_s=noted.get("cpu_s", 0.0),
        cpu_before_s=noted.get("cpu_before_s", 0.0),
    )


def sum_times(cases: Iterable[Case], *, wall: bool = False, by_file: bool = False) -> Times:
    """Number of tests and seconds by folder or file, and of all processes together."""
    sums: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        sums[case.file if by_file else case.file.rpartition("/")[0]].append(case.wall_s if wall else case.cpu_s)
    times = {name: (len(seconds), sum(seconds)) for name, seconds in sums.items()}
    if not wall:
        times[BEFORE] = (0, sum(case.cpu_before_s for case in cases))
    times[WHOLE] = (sum(count for count, _ in times.values()), sum(seconds for _, seconds in times.values()))
    return times


def compare(runs: Sequence[Times]) -> list[str]:
    """One row per folder, slowest first in the first run, with tests and seconds of every run."""
    names = ("before", "after") if len(runs) == 2 else [f"run {number}" for number in range(1, len(runs) + 1)]
    lines = ["| folder | " + " | ".join(f"tests, {name} | s, {name}" for name in names) + " |", "|---|" + "--:|--:|" * len(runs)]
    folders = sorted({folder for run in runs for folder in run}, key=lambda folder: (folder == WHOLE, -runs[0].get(folder, (0, 0.0))[1], folder))
    for folder in folders:
        cells = [f"{count} | {seconds:.0f}" for count, seconds in (run.get(folder, (0, 0.0)) for run in runs)]
        lines.append(f"| {folder} | " + " | ".join(cells) + " |")
    return lines


def slowest(cases: Iterable[Case], count: int) -> list[str]:
    """The `count` tests with the most processor seconds."""
    return [f"{case.cpu_s:7.2f}  {case.file}::{case.name}" for case in sorted(cases, key=lambda case: -case.cpu_s)[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of a test run by folder, from pytest's --junitxml.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.xml")
    parser.add_argument("--wall", action="store_true", help="wall seconds instead of processor seconds")
    parser.add_argument("--files", action="store_true", dest="by_file", help="a row per file instead of one per folder")
    parser.add_argument("--tests", type=int, default=0, metavar="N", help="also the N most expensive tests of the last file")
    chosen = parser.parse_args()
    runs = [read_cases(path) for path in chosen.files]
    print("\n".join(compare([sum_times(run, wall=chosen.wall, by_file=chosen.by_file) for run in runs])))
    print("\n".join(slowest(runs[-1], chosen.tests)))


if __name__ == "__main__":
    main()
