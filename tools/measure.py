"""Measures two or more variants of doing one thing alternately, and formats the results.

Variants alternate within each round, and every other round is reversed, so that a machine that warms up or slows down favors none. A ratio is
computed within each round, then the median over rounds. Next to wall seconds, the process's processor seconds are reported: a fairer number on a
busy machine. Pure except for the clocks; `tools/bench` handles the files.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Metrics = Mapping[str, float]
CPU_SECONDS = "CPU s"
Clock = Callable[[], float]
Variant = Callable[[], Metrics | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """One question, answered by timing variants against a baseline.

    `make_variants` prepares everything that is not timed and returns name -> call; all calls do the same work. The metrics a call returns (peak
    bytes, steps) are reported next to its time. The other variants are compared with `baseline`. `synchronize` waits for a device after each call.
    With `work_per_call`, a table of `work_unit` per second is added. `time_metric` names a metric in seconds that replaces the call's own time, if
    only part of the call is of interest.
    """

    question: str
    make_variants: Callable[[], Mapping[str, Variant]]
    baseline: str
    num_rounds: int = 7
    num_warmups: int = 1
    work_per_call: float | None = None
    work_unit: str = "calls"
    synchronize: Callable[[], None] | None = None
    packages: Sequence[str] = ("torch",)
    time_metric: str | None = None


@dataclass(slots=True)
class Samples:
    """Measurements of one variant, one entry per round."""

    times_s: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)


def measure(
    bench: Bench, *, num_rounds: int | None = None, clock: Clock = time.perf_counter, cpu_clock: Clock | None = time.process_time
) -> dict[str, Samples]:
    """Run the warm-ups and the rounds. `cpu_clock` None: no processor seconds.

    Raises:
        ValueError: the baseline is not a variant.
    """
    variants = bench.make_variants()
    if bench.baseline not in variants:
        raise ValueError(f"the baseline {bench.baseline!r} is not one of the variants: {', '.join(variants)}")
    for _ in range(bench.num_warmups):
        for call in variants.values():
            _time_call(call, bench.synchronize, clock, cpu_clock)
    samples = {name: Samples() for name in variants}
    for index in range(num_rounds or bench.num_rounds):
        gc.collect()  # between calls, so that no call pays for another's garbage
        for name in order_of_round(list(variants), index):
            time_s, metrics = _time_call(variants[name], bench.synchronize, clock, cpu_clock)
            samples[name].times_s.append(time_s if bench.time_metric is None else metrics[bench.time_metric])
            for key, value in metrics.items():
                samples[name].metrics.setdefault(key, []).append(value)
    return samples


def order_of_round(names: Sequence[str], index: int) -> list[str]:
    """Forward in even rounds, reversed in odd ones."""
    return list(names) if index % 2 == 0 else list(reversed(names))


def _time_call(call: Variant, synchronize: Callable[[], None] | None, clock: Clock, cpu_clock: Clock | None) -> tuple[float, Metrics]:
    """The call's time and metrics, among them its processor seconds unless it counts them itself."""
    began_s, cpu_began_s = clock(), cpu_clock() if cpu_clock is not None else 0.0
    metrics = call() or {}
    if synchronize is not None:
        synchronize()
    time_s = clock() - began_s
    return time_s, metrics if cpu_clock is None else {CPU_SECONDS: cpu_clock() - cpu_began_s, **metrics}


def paired_ratio(times_s: Sequence[float], baseline_s: Sequence[float]) -> tuple[float, float, float]:
    """(median, lowest, highest) of time / baseline time in the same round; above 1 is slower than the baseline."""
    ratios = [mine / theirs for mine, theirs in zip(times_s, baseline_s)]
    return statistics.median(ratios), min(ratios), max(ratios)


def report_table(bench: Bench, samples: Mapping[str, Samples]) -> list[str]:
    """The result as lines of a Markdown table."""
    rate = f" {bench.work_unit}/s |" if bench.work_per_call else ""
    names = list(dict.fromkeys(key for one in samples.values() for key in one.metrics))
    extra = "".join(f" {name} |" for name in names)
    columns = 5 + bool(bench.work_per_call) + len(names)
    lines = [f"| variant | median s | min..max s | time / {bench.baseline} | its min..max |{rate}{extra}", "|" + " --- |" * columns]
    for name, one in samples.items():
        middle_s = statistics.median(one.times_s)
        ratio, lowest, highest = paired_ratio(one.times_s, samples[bench.baseline].times_s)
        row = f"| {name} | {middle_s:.4g} | {min(one.times_s):.4g}..{max(one.times_s):.4g} | {ratio:.3f} | {lowest:.3f}..{highest:.3f} |"
        row += f" {bench.work_per_call / middle_s:.4g} |" if bench.work_per_call else ""
        lines.append(row + "".join(f" {_median_or_dash(one.metrics.get(key))} |" for key in names))
    return lines


def _median_or_dash(values: Sequence[float] | None) -> str:
    return f"{statistics.median(values):.4g}" if values else "-"


def raw_lines(samples: Mapping[str, Samples]) -> list[str]:
    """Every number, in round order."""
    lines = []
    for name, one in samples.items():
        lines.append(f"{name} s: {' '.join(f'{value:.4g}' for value in one.times_s)}")
        lines += [f"{name} {key}: {' '.join(f'{value:.6g}' for value in values)}" for key, values in one.metrics.items()]
    return lines
