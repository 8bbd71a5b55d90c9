from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cpu_times import CpuTimes
from tools.suite_time import BEFORE, WHOLE, compare, read_cases, slowest, sum_times

pytest_plugins = ["pytester"]
XML = """<testsuites><testsuite name="pytest" time="9">
<testcase classname="tests.modules.test_a" name="test_one" time="{one}"><properties>
<property name="cpu_before_s" value="3.5" /><property name="cpu_s" value="{one}" /><property name="another's" value="x" /></properties></testcase>
<testcase classname="tests.modules.test_a.TestB" name="test_two" time="2.0"><properties><property name="cpu_s" value="1.5" /></properties></testcase>
<testcase classname="tests.test_launch" name="test_three" time="4.5" />
</testsuite></testsuites>"""


def test_times_are_summed_by_folder_and_compared(tmp_path: Path) -> None:
    runs = []
    for name, one in (("before", "5.0"), ("after", "1.0")):
        path = tmp_path / f"{name}.xml"
        path.write_text(XML.format(one=one))
        runs.append(read_cases(path))
    assert sum_times(runs[0]) == {"tests/modules": (2, 6.5), "tests": (1, 0.0), BEFORE: (0, 3.5), WHOLE: (3, 10.0)}
    assert sum_times(runs[0], by_file=True)["tests/modules/test_a"] == (2, 6.5)
    walls = [sum_times(run, wall=True) for run in runs]
    assert compare(walls)[2:] == ["| tests/modules | 2 | 7 | 2 | 3 |", "| tests | 1 | 4 | 1 | 4 |", "| whole run | 3 | 12 | 3 | 8 |"]
    assert compare(walls[:1])[0] == "| folder | tests, run 1 | s, run 1 |"
    assert slowest(runs[0], 1) == ["   5.00  tests/modules/test_a::test_one"]


BURNS = """
    import subprocess, sys, time

    BURN = "import time\\nwhile time.process_time() < {}: pass"

    def test_itself():
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass

    def test_with_a_child():
        subprocess.run([sys.executable, "-c", BURN.format(0.3)])

    def test_with_a_child_that_goes_on():
        child = subprocess.Popen([sys.executable, "-c", BURN.format(0.3) + "\\nprint(flush=True)\\ntime.sleep(60)"], stdout=subprocess.PIPE)
        child.stdout.readline()
        test_with_a_child_that_goes_on.child = child

    def test_that_ends_it():
        child = test_with_a_child_that_goes_on.child
        child.kill()
        child.communicate()
"""


def test_a_test_s_seconds_are_its_own_and_its_children_s(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(BURNS)
    pytester.runpytest_inprocess("--junitxml=times.xml", plugins=[CpuTimes()]).assert_outcomes(passed=4)
    cases = read_cases(pytester.path / "times.xml")
    assert [case.cpu_before_s > 0 for case in cases] == [True, False, False, False]
    itself, child, running, end = (case.cpu_s for case in cases)
    assert itself >= 0.09 and child >= 0.29
    assert running >= 0.29 or not Path("/proc/self/stat").exists()
    assert end < 0.29, "a running child's seconds are not counted again when it ends"
