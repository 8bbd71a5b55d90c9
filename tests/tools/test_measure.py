"""Rounds, ratios and tables of the bench runner, with a fake clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import choose_nightly
from tools import benchmarking
from tools.benchmarking import list_themes, write_report
from tools.core_share import CoreShare, measure_core_share, share_of_cores, wait_for_quiet
from tools.development import pytest_arguments
from tools.measure import Bench, Samples, measure, order_of_round, paired_ratio, raw_lines, report_table


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def spend(self, name: str, time_s: float, calls: list[str]) -> Callable[[], dict[str, float] | None]:
        def call() -> dict[str, float] | None:
            calls.append(name)
            self.now_s += time_s
            return {"peak MB": 5.0} if name == "slow" else None

        return call


def make_bench(clock: Clock, calls: list[str]) -> Bench:
    variants = {"fast": clock.spend("fast", 1.0, calls), "slow": clock.spend("slow", 2.0, calls)}
    return Bench(question="Which?", make_variants=lambda: variants, baseline="fast", num_rounds=3, work_per_call=10, work_unit="steps", packages=())


def test_variants_take_turns_and_every_other_round_goes_backwards() -> None:
    clock, calls = Clock(), []
    samples = measure(make_bench(clock, calls), clock=clock, cpu_clock=None)
    assert calls == ["fast", "slow", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert samples["slow"] == Samples(times_s=[2.0] * 3, metrics={"peak MB": [5.0] * 3})


def test_a_device_is_waited_for() -> None:
    clock, waits = Clock(), []
    bench = Bench(question="", make_variants=lambda: {"a": lambda: None}, baseline="a", synchronize=lambda: waits.append(1))
    measure(bench, num_rounds=2, clock=clock, cpu_clock=None)
    assert len(waits) == 3


def test_processor_seconds_stand_beside_wall_seconds_unless_the_call_counts_them() -> None:
    wall, processor = Clock(), Clock()
    calls = {"a": processor.spend("a", 3.0, []), "b": lambda: {"CPU s": 7.0}}
    samples = measure(Bench(question="", make_variants=lambda: calls, baseline="a", num_rounds=1), clock=wall, cpu_clock=processor)
    assert samples["a"].metrics == {"CPU s": [3.0]}
    assert samples["b"].metrics == {"CPU s": [7.0]}


def test_a_busy_machine_is_waited_for_until_patience_ends() -> None:
    looks, slept = iter([0.5, 0.6, 0.99]), []
    seen = wait_for_quiet(60, look=lambda: CoreShare(next(looks), 2), sleep=slept.append, pause_s=5)
    assert (seen.share, slept) == (0.99, [5, 5])
    assert not wait_for_quiet(10, look=lambda: CoreShare(0.5, 2), sleep=slept.append, pause_s=5).is_quiet
    assert len(slept) == 4
    assert str(CoreShare(0.6, 2)) == "1.20 of 2 cores"


def test_the_share_of_cores_is_the_time_alone_over_the_time_together() -> None:
    assert share_of_cores([1.0, 1.0, 1.0], [2.0, 2.0, 9.0], 2) == CoreShare(0.5, 2)
    assert share_of_cores([1.1, 1.0, 1.0], [1.0, 1.0, 1.0], 4) == CoreShare(1.0, 4)
    assert 0 < measure_core_share(2, lambda: sum(range(1000))).share <= 1


def test_a_baseline_that_is_no_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="not one of the variants: a"):
        measure(Bench(question="", make_variants=lambda: {"a": lambda: None}, baseline="b"))


def test_ratios_are_taken_within_a_round() -> None:
    assert paired_ratio([2.0, 40.0, 3.0], [1.0, 20.0, 1.0]) == (2.0, 2.0, 3.0)
    assert order_of_round(["a", "b"], 1) == ["b", "a"]


def test_the_table_has_time_ratio_rate_and_what_calls_return() -> None:
    clock = Clock()
    bench = make_bench(clock, [])
    lines = report_table(bench, measure(bench, clock=clock, cpu_clock=None))
    assert lines[0] == "| variant | median s | min..max s | time / fast | its min..max | steps/s | peak MB |"
    assert lines[2:] == ["| fast | 1 | 1..1 | 1.000 | 1.000..1.000 | 10 | - |", "| slow | 2 | 2..2 | 2.000 | 2.000..2.000 | 5 | 5 |"]
    assert raw_lines({"a": Samples([1.0, 2.0], {"m": [3.0]})}) == ["a s: 1 2", "a m: 3"]


def test_the_report_keeps_what_a_person_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarking, "describe_machine", lambda: "a machine")
    clock, path = Clock(), tmp_path / "theme.md"
    bench = make_bench(clock, [])
    for _ in range(2):
        write_report(path, "theme", bench, measure(bench, clock=clock), command="python tools/bench theme", cores="1.98 of 2 cores")
        text = path.read_text()
        assert text.startswith("# theme\n\nWhich?\n")
        assert "- command: `python tools/bench theme`" in text
        assert "- cores: 1.98 of 2 cores" in text
        if "## Reading" not in text:
            path.write_text(text + "\n## Reading\n\nIt is fast.\n")
    assert text.count("It is fast.") == 1
    assert text.count("| slow |") == 1


def test_themes_are_listed_without_importing_them(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text('"""How fast?\n\nMore."""\nraise RuntimeError\n')
    (tmp_path / "_shared.py").write_text("")
    assert list_themes(tmp_path) == {"one": "How fast?"}


def test_the_whole_suite_runs_on_all_cores_and_a_part_as_asked() -> None:
    assert pytest_arguments([], 2) == ["-n", "3", "--dist", "loadfile", "--no-loadscope-reorder"]
    assert pytest_arguments([], 64)[1] == "4"
    assert pytest_arguments([], 1) == []
    assert pytest_arguments(["tests/x.py"], 8) == ["tests/x.py"]
    assert pytest_arguments(["--nightly", "2/7"], 2) == ["-n", "3", "--dist", "loadfile", "--no-loadscope-reorder", "--nightly", "2/7"]
    assert pytest_arguments(["--nightly=2/7", "--junitxml", "a.xml"], 2)[-3:] == ["--nightly=2/7", "--junitxml", "a.xml"]
    assert pytest_arguments(["--nightly=2/7", "--junitxml", "a.xml"], 2)[0] == "-n"
    assert pytest_arguments(["--nightly", "all", "tests/x.py"], 2) == ["--nightly", "all", "tests/x.py"]


def test_nightly_tests_take_turns() -> None:
    names = [f"test {number}" for number in range(10)]
    assert choose_nightly("none", names) == set()
    assert choose_nightly("all", names) == set(names)
    parts = [choose_nightly(f"{part}/7", names) for part in range(1, 8)]
    assert set().union(*parts) == set(names)
    assert sum(len(part) for part in parts) == len(names)
    for wrong in ("0/7", "8/7", "some", "1/0"):
        with pytest.raises(pytest.UsageError, match="--nightly"):
            choose_nightly(wrong, names)
