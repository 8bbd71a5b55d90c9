"""The link test: the meaning of each outcome, processes that hang, crash or report nonsense, and what is kept between runs."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backend.devices import link_probe, link_test, virtual_gpu
from backend.devices.link_test import CardPair, ProbeResult, follow, judge, link_verdicts, run_all, verdict_of
from backend.devices.slot import Slot

STAGED = {"bytes_per_ms": 8e6, "latency_ms": 0.04}
DIRECT = {"bytes_per_ms": 20e6, "latency_ms": 0.02}
GOOD = {"peer": True, "wrong_bytes": 0, "staged": STAGED, "direct": DIRECT}
WRONG = {**GOOD, "wrong_bytes": 4096}
NO_PEER = {"peer": False, "wrong_bytes": 0, "staged": STAGED}


# what a report means


def test_a_checked_link_is_used_with_its_own_speed() -> None:
    verdict = judge(GOOD)
    assert (verdict.route, verdict.bytes_per_ms, verdict.latency_ms) == ("peer", 20e6, 0.02)
    assert str(verdict) == "peer, 20.0 GB/s (checked)"


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (WRONG, "direct copies delivered 4096 wrong bytes"),
        (NO_PEER, "the driver offers no direct copies between these cards"),
        ({**GOOD, "direct": {"bytes_per_ms": 1e6, "latency_ms": 0.3}}, "direct copies are correct but slower (1.0 GB/s)"),
    ],
)
def test_other_tensors_go_through_main_memory_at_its_speed(report: dict[str, Any], reason: str) -> None:
    verdict = judge(report)
    assert (verdict.route, verdict.reason, verdict.bytes_per_ms) == ("staged", reason, 8e6)


def test_a_link_that_is_faster_but_not_sooner_is_used() -> None:
    assert judge({**GOOD, "direct": {"bytes_per_ms": 20e6, "latency_ms": 0.3}}).route == "peer"


@pytest.mark.parametrize(
    ("ending", "reason"), [("hang", "its test did not end in time"), ("crash", "its test crashed"), ("done", "its test reported nothing")]
)
def test_without_a_report_nothing_is_trusted(ending: Any, reason: str) -> None:
    verdict = judge(None, ending)
    assert (verdict.route, verdict.reason, verdict.bytes_per_ms) == ("staged", reason, None)


# continuing after pairs that fail


class FakeRunner:
    """Fake cards: each pair has a report, or a way in which its test ends the process."""

    def __init__(self, behavior: dict[CardPair, Any]) -> None:
        self.behavior, self.runs = behavior, list[list[CardPair]]()

    def __call__(self, pairs: Sequence[CardPair]) -> ProbeResult:
        self.runs.append(list(pairs))
        reports = {}
        for pair in pairs:
            if isinstance(self.behavior[pair], str):
                return ProbeResult(reports=reports, ending=self.behavior[pair], during=pair)  # type: ignore[arg-type]
            reports[pair] = self.behavior[pair]
        return ProbeResult(reports=reports, ending="done")


def pairs_of(num_cards: int) -> list[CardPair]:
    return [(a, b) for a in range(num_cards) for b in range(num_cards) if a != b]


def test_all_good_takes_one_process() -> None:
    run = FakeRunner(dict.fromkeys(pairs_of(3), GOOD))
    assert {verdict.route for verdict in run_all(pairs_of(3), run).values()} == {"peer"}
    assert len(run.runs) == 1


@pytest.mark.parametrize("ending", ["hang", "crash"])
def test_a_pair_that_ends_the_process_is_left_out_in_both_directions_and_the_others_are_tested(ending: str) -> None:
    run = FakeRunner({**dict.fromkeys(pairs_of(3), GOOD), (0, 2): ending, (2, 0): ending})
    routes = {pair: verdict.route for pair, verdict in run_all(pairs_of(3), run).items()}
    assert routes == {**dict.fromkeys(pairs_of(3), "peer"), (0, 2): "staged", (2, 0): "staged"}
    assert run.runs == [pairs_of(3), [(1, 0), (1, 2), (2, 1)]]


def test_wrong_bytes_one_way_distrust_both_ways() -> None:
    verdicts = run_all(pairs_of(2), FakeRunner({(0, 1): GOOD, (1, 0): WRONG}))
    assert [verdicts[pair].route for pair in pairs_of(2)] == ["staged", "staged"]
    assert verdicts[0, 1].reason == "the other direction: direct copies delivered 4096 wrong bytes"


def test_a_process_that_never_begins_is_not_started_again() -> None:
    calls = []

    def run(pairs: Sequence[CardPair]) -> ProbeResult:
        calls.append(pairs)
        return ProbeResult(reports={}, ending="hang")

    assert {verdict.route for verdict in run_all(pairs_of(3), run).values()} == {"staged"}
    assert len(calls) == 1


# reading the process's output


def lines(*said: dict[str, Any] | str | None) -> Iterator[str | None]:
    return iter([json.dumps(one) if isinstance(one, dict) else one for one in said])


def test_reports_are_read_between_lines_that_say_nothing() -> None:
    result = follow(lines("NVIDIA: hello", {"begin": [0, 1]}, "[1]", {"pair": [0, 1], "peer": False}, {"begin": [1, 0]}), 2)
    assert dict(result.reports) == {(0, 1): {"pair": [0, 1], "peer": False}}
    assert (result.ending, result.during) == ("crash", (1, 0))


def test_a_missing_line_counts_as_a_hang_of_the_started_pair() -> None:
    result = follow(lines({"begin": [0, 1]}, None), 2)
    assert (result.ending, result.during) == ("hang", (0, 1))


def test_a_process_that_has_reported_everything_is_not_awaited() -> None:
    said = lines({"begin": [0, 1]}, {"pair": [0, 1]}, None)
    assert follow(said, 1).ending == "done"
    assert next(said) is None


def play_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Replace the test's process with `script`."""
    path = tmp_path / "probe.py"
    path.write_text(script, encoding="utf-8")
    popen = link_test.subprocess.Popen
    monkeypatch.setattr(link_test.subprocess, "Popen", lambda command, **settings: popen([sys.executable, str(path)], **settings))


def test_a_real_process_is_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = (
        "import json, sys\nfor a, b in json.load(sys.stdin)['pairs']:\n"
        "    print(json.dumps({'begin': [a, b]}))\n    print(json.dumps({'pair': [a, b], 'peer': True}))\n"
    )
    play_process(monkeypatch, tmp_path, script)
    result = link_test.run_probe([(0, 1), (1, 0)])
    assert sorted(result.reports) == [(0, 1), (1, 0)]
    assert result.ending == "done"


def test_a_real_process_that_dies_in_a_pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    play_process(monkeypatch, tmp_path, "import os\nprint('{\"begin\": [0, 1]}', flush=True)\nos.abort()\n")
    result = link_test.run_probe([(0, 1)])
    assert (result.ending, result.during) == ("crash", (0, 1))


def test_a_real_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    play_process(monkeypatch, tmp_path, "import threading\nprint('{\"begin\": [0, 1]}', flush=True)\nthreading.Event().wait()\n")
    monkeypatch.setattr(link_test, "LINE_LIMIT_S", 0.05)
    result = link_test.run_probe([(0, 1)])
    assert (result.ending, result.during) == ("hang", (0, 1))


def test_the_probe_itself_says_its_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"pairs": [[0, 1]]})))
    monkeypatch.setattr(link_probe, "probe_pair", lambda source, target: {"peer": False, "between": [str(source), str(target)]})
    link_probe.main()
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said == [{"begin": [0, 1]}, {"pair": [0, 1], "peer": False, "between": ["cuda:0", "cuda:1"]}]


def test_wrong_bytes_are_counted_wherever_a_copy_spoils_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On virtual GPUs, whose copies are correct; then with a copy that loses its last byte, and one that never arrives."""
    one, other = virtual_gpu.install((2**22, 2**22))
    assert link_probe.count_wrong_bytes(one, other, 5000, seed=1) == 0
    copy = torch.Tensor.copy_

    def lose_the_last(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return copy(self[:-1], source[:-1]) if isinstance(self, virtual_gpu.VirtualTensor) else copy(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", lose_the_last)
    assert link_probe.count_wrong_bytes(one, other, 5000, seed=1) == 1

    def lose_all(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return self if isinstance(source, virtual_gpu.VirtualTensor) else copy(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", lose_all)
    assert link_probe.count_wrong_bytes(one, other, 5000, seed=1) == 5000


# slots and what is kept


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeRunner]:
    """Two cards with a driver and fake link tests; verdicts are kept in the test's folder."""
    runner = FakeRunner({(0, 1): GOOD, (1, 0): WRONG})
    monkeypatch.setattr(link_test._verdicts_of_cards, "__defaults__", (runner,))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda card: SimpleNamespace(name="Card", uuid=f"uuid-{card}"))
    monkeypatch.setattr(link_test, "read_telemetry", lambda: (SimpleNamespace(driver="595.1"),))
    link_test.keep_verdicts_in(tmp_path)
    yield runner
    link_test.keep_verdicts_in(link_test._DEFAULT_CACHE_FILE.parent)


def slots_on(*devices: str) -> list[Slot]:
    return [Slot(index, torch.device(device), device, 1) for index, device in enumerate(devices)]


def test_slots_without_two_cards_start_no_process(cards: FakeRunner) -> None:
    virtual_gpu.install((2**20, 2**20))
    found = link_verdicts(slots_on("cpu", "cpu", "vgpu:0", "vgpu:1", "cuda:0", "cuda:0", "xpu:0"))
    assert found[0, 1].route == found[4, 5].route == "same"
    assert found[0, 2].route == found[2, 3].route == found[0, 4].route == "direct"
    assert found[4, 6].route == "staged"
    assert len(found) == 42
    assert cards.runs == []


def test_links_of_cards_are_tested_once_and_kept(cards: FakeRunner, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    slots = slots_on("cuda:1", "cpu", "cuda:0")
    with caplog.at_level(logging.INFO):
        assert link_verdicts(slots)[0, 2].reason == "direct copies delivered 4096 wrong bytes"
    assert "IOMMU" in caplog.text
    assert "NCCL_P2P_DISABLE" in caplog.text
    assert verdict_of(slots[2], slots[0]).route == "staged"
    assert len(cards.runs) == 1
    link_test.keep_verdicts_in(tmp_path)  # like a new process
    assert link_verdicts(slots)[0, 2].reason == "direct copies delivered 4096 wrong bytes"
    assert len(cards.runs) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["links.json"]


def test_another_driver_card_or_system_start_is_tested_again(cards: FakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = slots_on("cuda:0", "cuda:1")
    link_verdicts(slots)
    monkeypatch.setattr(link_test, "read_telemetry", lambda: (SimpleNamespace(driver="600.2"),))
    link_verdicts(slots)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda card: SimpleNamespace(name="Card", uuid=f"other-{card}"))
    link_verdicts(slots)
    monkeypatch.setattr(link_test, "_identify_boot", lambda: "another")
    link_verdicts(slots)
    assert len(cards.runs) == 4
    kept = json.loads((tmp_path / "links.json").read_text(encoding="utf-8"))
    assert all("boot another" in key for key in kept)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {"route": "peer"}}'])
def test_a_damaged_file_is_made_again(cards: FakeRunner, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "links.json").write_text(text, encoding="utf-8")
    link_verdicts(slots_on("cuda:0", "cuda:1"))
    assert "tested again" in caplog.text
    assert len(json.loads((tmp_path / "links.json").read_text(encoding="utf-8"))) == 2


def test_a_folder_that_cannot_be_written_costs_a_warning(cards: FakeRunner, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    link_test.keep_verdicts_in(tmp_path / "file")
    assert link_verdicts(slots_on("cuda:0", "cuda:1"))[0, 1].route == "staged"
    assert "cannot be written" in caplog.text


@pytest.mark.gpu
def test_real_cards_are_tested(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    link_test.keep_verdicts_in(tmp_path)
    verdict = link_verdicts(slots_on("cuda:0", "cuda:1"))[0, 1]
    assert verdict.route in ("peer", "staged")
    assert verdict.bytes_per_ms is None or verdict.bytes_per_ms > 0
