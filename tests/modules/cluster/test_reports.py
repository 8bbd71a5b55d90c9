from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.cluster.reports import MAX_TEXT, read_report
from modules.cluster.values import MessageError

GOOD: dict[str, Any] = {
    "worker": "abc",
    "machine": "gpu-box",
    "address": "10.0.0.5",
    "versions": {"torch": "2.13.0"},
    "slots": [{"device": "cuda:0", "name": "GPU", "total_bytes": 100, "free_bytes": 40, "utilization": 7}],
    "checkpoint": "key",
    "networks": ["ink.safetensors"],
}


def test_a_report_is_read() -> None:
    report = read_report(GOOD)
    assert (report.worker, report.machine, report.checkpoint, report.networks) == ("abc", "gpu-box", "key", frozenset({"ink.safetensors"}))
    assert (report.slots[0].total_bytes, report.slots[0].utilization, report.largest_slot_bytes) == (100, 7.0, 100)


@pytest.mark.parametrize(
    "raw", [None, [], "x", {}, {**GOOD, "worker": ""}, {**GOOD, "slots": [1]}, {**GOOD, "versions": 3}, {**GOOD, "networks": None}]
)
def test_what_is_no_report_is_refused(raw: Any) -> None:
    with pytest.raises(MessageError):
        read_report(raw)


def test_long_text_control_codes_and_impossible_numbers_are_tamed() -> None:
    slot = {"device": "x" * 9999, "name": "\x1b[2J\n", "total_bytes": -5, "free_bytes": 1e300, "utilization": math.nan}
    report = read_report({**GOOD, "machine": "a\r\nERROR: forged", "slots": [slot] * 9999, "num_done": True, "step_ms": "fast"})
    assert report.machine == "a  ERROR: forged"
    assert len(report.slots) == 256
    assert (len(report.slots[0].device), report.slots[0].total_bytes, report.slots[0].free_bytes) == (MAX_TEXT, 0, 0)
    assert (report.slots[0].utilization, report.num_done, report.step_ms) == (None, 0, None)
    assert "\x1b" not in report.slots[0].name


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4), lambda inner: st.lists(inner, max_size=2))


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(GOOD)), json_values))
def test_any_report_is_read_or_refused(changes: dict[str, Any]) -> None:
    with suppress(MessageError):
        read_report({**GOOD, **changes})
