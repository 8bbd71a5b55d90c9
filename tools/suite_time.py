"""Where the test suite spends its time, by folder: `python -m tools.suite_time BEFORE.xml AFTER.xml` prints a Markdown table.

The files are pytest's own: `python tools/test --junitxml AFTER.xml`. One file gives the table of one run.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

Times = dict[str, tuple[int, float]]


def read_times(path: Path) -> Times:
    """Number of tests and seconds (including setup) by folder; "whole run" is the sum of wall times of all processes."""
    folders: dict[str, list[float]] = defaultdict(list)
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    for case in (case for suite in suites for case in suite.iter("testcase")):
        parts = [part for part in case.attrib["classname"].split(".") if not part[:1].isupper()]
        folders["/".join(parts[:-1])].append(float(case.attrib["time"]))
    times = {folder: (len(seconds), sum(seconds)) for folder, seconds in folders.items()}
    times["whole run"] = (sum(count for count, _ in times.values()), sum(float(suite.attrib["time"]) for suite in suites))
    return times


def compare(runs: Sequence[Times]) -> list[str]:
    """One row per folder, slowest first in the first run, with tests and seconds of every run."""
    names = ("before", "after") if len(runs) == 2 else [f"run {number}" for number in range(1, len(runs) + 1)]
    lines = ["| folder | " + " | ".join(f"tests, {name} | s, {name}" for name in names) + " |", "|---|" + "--:|--:|" * len(runs)]
    folders = sorted(
        {folder for run in runs for folder in run}, key=lambda folder: (folder == "whole run", -runs[0].get(folder, (0, 0.0))[1], folder)
    )
    for folder in folders:
        cells = [f"{count} | {seconds:.0f}" for count, seconds in (run.get(folder, (0, 0.0)) for run in runs)]
        lines.append(f"| {folder} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(compare([read_times(Path(word)) for word in sys.argv[1:]])))
