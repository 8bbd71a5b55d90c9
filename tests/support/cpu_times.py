"""Notes in `--junitxml` how many processor seconds each test took: unlike wall time, they mean something on a machine that others use too.

A test's seconds are those of all threads of this process and of its child processes. They include the fixtures that the test was the first to ask for
or the last to use. What came before the first test (imports, collection) is noted with that test under a name of its own. `tools/suite_time.py` sums
both by folder.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class CpuTimes:
    """A pytest plugin; each worker of pytest-xdist has its own."""

    def __init__(self) -> None:
        self._last_s: float | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if self._last_s is None:
            self._last_s = spent_s()
            item.user_properties.append(("cpu_before_s", f"{self._last_s:.3f}"))
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        if call.when == "teardown":  # the properties are written from its report
            now_s = spent_s()
            # a browser that ends takes the seconds of its own children with it, which were counted before
            item.user_properties.append(("cpu_s", f"{max(0.0, now_s - (self._last_s or 0.0)):.3f}"))
            self._last_s = now_s
        return (yield)


def spent_s() -> float:
    """Processor seconds of this process and its children. Linux also tells of those that still run, such as a browser that ends with the session."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + sum(_running_children_s(os.getpid()))


def _running_children_s(pid: int) -> Iterator[float]:
    """Processor seconds of each running process below `pid`, with those of its finished children."""
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        children[int(fields[1])].append((int(path.parent.name), sum(map(int, fields[11:15])) / TICKS_PER_S))
    waiting = children[pid]
    while waiting:
        child, seconds = waiting.pop()
        yield seconds
        waiting += children[child]
