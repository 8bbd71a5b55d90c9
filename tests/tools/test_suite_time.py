from __future__ import annotations

from pathlib import Path

from tools.suite_time import compare, read_times

XML = """<testsuites><testsuite name="pytest" time="{wall}">
<testcase classname="tests.modules.test_a" name="test_one" time="{one}" />
<testcase classname="tests.modules.test_a.TestB" name="test_two" time="2.0" />
<testcase classname="tests.test_launch" name="test_three" time="4.5" />
</testsuite></testsuites>"""


def test_times_are_summed_by_folder_and_compared(tmp_path: Path) -> None:
    runs = []
    for name, wall, one in (("before", "9.0", "5.0"), ("after", "5.5", "1.0")):
        path = tmp_path / f"{name}.xml"
        path.write_text(XML.format(wall=wall, one=one))
        runs.append(read_times(path))
    assert runs[0] == {"tests/modules": (2, 7.0), "tests": (1, 4.5), "whole run": (3, 9.0)}
    assert compare(runs)[2:] == ["| tests/modules | 2 | 7 | 2 | 3 |", "| tests | 1 | 4 | 1 | 4 |", "| whole run | 3 | 9 | 3 | 6 |"]
    assert compare(runs[:1])[0] == "| folder | tests, run 1 | s, run 1 |"
