"""A day of a large cluster in a minute: jobs arrive, the router's own code places them, and made-up workers take the time that jobs and loads take.

Compared with round-robin, which gives each job, in order, to the worker that has been idle longest, whatever that has loaded.

    python -m tools.cluster_simulation --workers 1000 --jobs 1000000 --report benchmarks/cluster_simulation.md
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import platform
import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from modules.cluster.backlog import Backlog
from modules.cluster.routing import Candidate, Need, Router

DAY_S = 86_400.0
RHYTHM = 0.6
"""Arrivals swing by this share around their mean over the day: the busiest hour has 1.6 times the mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Day:
    """What is simulated. Job times are lognormal with the mean `job_s`; the number k of `num_checkpoints` is asked for in proportion to 1 / k."""

    num_workers: int = 1000
    num_jobs: int = 1_000_000
    num_checkpoints: int = 100
    job_s: float = 50.0
    load_s: float = 20.0
    spread: float = 0.8
    seed: int = 20


@dataclass(frozen=True, slots=True)
class Job:
    """Job number `number` arrives at `at_s`, needs checkpoint `checkpoint` and computes for `run_s` on a worker of speed 1."""

    number: int
    at_s: float
    checkpoint: str
    run_s: float


@dataclass
class Outcome:
    """What became of the jobs. Waits are from arrival to start, in seconds."""

    waits_s: list[float] = field(default_factory=list)
    num_loads: int = 0
    end_s: float = 0.0
    busy_s: float = 0.0
    deciding_s: float = 0.0

    def percentile(self, share: float) -> float:
        """The wait that `share` of the jobs did not exceed."""
        ordered = sorted(self.waits_s)
        return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


class Policy(Protocol):
    """Decides which job starts where."""

    def arrive(self, job: Job) -> None: ...

    def start_next(self, now_s: float) -> tuple[Job, str, bool] | None:
        """A job, its worker, and whether it has to load; None if nothing can start now."""

    def leave(self, worker: str) -> None:
        """The worker's job has ended."""

    def next_change_s(self, now_s: float) -> float | None:
        """Seconds until a waiting job may start though nothing else happens."""


def make_jobs(day: Day) -> Iterator[Job]:
    """The day's jobs, in order of arrival."""
    dice = random.Random(day.seed)
    names = [f"checkpoint {number}" for number in range(1, day.num_checkpoints + 1)]
    weights = list(itertools.accumulate(1 / number for number in range(1, day.num_checkpoints + 1)))
    mean = math.log(day.job_s) - day.spread**2 / 2
    for number, at_s in enumerate(sorted(_arrivals(day, dice))):
        yield Job(number, at_s, dice.choices(names, cum_weights=weights)[0], dice.lognormvariate(mean, day.spread))


def _arrivals(day: Day, dice: random.Random) -> Iterator[float]:
    """Times of arrival in the day's rhythm, by rejection."""
    num_left = day.num_jobs
    while num_left:
        at_s = dice.uniform(0, DAY_S)
        if dice.random() * (1 + RHYTHM) <= 1 + RHYTHM * math.sin(2 * math.pi * at_s / DAY_S):
            num_left -= 1
            yield at_s


class OurRouting:
    """Router and backlog of modules.cluster."""

    def __init__(self, day: Day) -> None:
        self._router = Router(load_s=day.load_s, job_s=day.job_s)
        self._backlog: Backlog[Job] = Backlog(self._router)
        for number in range(day.num_workers):
            self._router.add(Candidate(name=str(number)))

    def arrive(self, job: Job) -> None:
        self._backlog.add(job, Need(checkpoint=job.checkpoint), job.at_s)

    def start_next(self, now_s: float) -> tuple[Job, str, bool] | None:
        loads_before = self._router.num_loads
        placed = self._backlog.place_next(now_s)
        return None if placed is None else (*placed, self._router.num_loads > loads_before)

    def leave(self, worker: str) -> None:
        self._router.release(worker)

    def next_change_s(self, now_s: float) -> float | None:
        return self._backlog.seconds_to_next_change(now_s) if self._router.num_idle() else None


class RoundRobin:
    """First come, first served; the worker that has been idle longest."""

    def __init__(self, day: Day) -> None:
        self._idle = deque(str(number) for number in range(day.num_workers))
        self._loaded: dict[str, str] = {}
        self._waiting: deque[Job] = deque()

    def arrive(self, job: Job) -> None:
        self._waiting.append(job)

    def start_next(self, now_s: float) -> tuple[Job, str, bool] | None:
        if not (self._waiting and self._idle):
            return None
        job, worker = self._waiting.popleft(), self._idle.popleft()
        is_load = self._loaded.get(worker) != job.checkpoint
        self._loaded[worker] = job.checkpoint
        return job, worker, is_load

    def leave(self, worker: str) -> None:
        self._idle.append(worker)

    def next_change_s(self, now_s: float) -> float | None:
        return None


def simulate(day: Day, jobs: Sequence[Job], policy: Policy) -> Outcome:
    """Run the jobs; every one ends. Raises RuntimeError if one is lost or run twice."""
    outcome, started = Outcome(), bytearray(len(jobs))
    events: list[tuple[float, int, str | None]] = []  # (when, tie break, worker whose job ends, or None: look again)
    numbers, arrivals, looked_s = itertools.count(), 0, -1.0
    while arrivals < len(jobs) or events:
        next_arrival_s = jobs[arrivals].at_s if arrivals < len(jobs) else math.inf
        if events and events[0][0] <= next_arrival_s:
            now_s, _, worker = heapq.heappop(events)
            if worker is not None:
                policy.leave(worker)
        else:
            now_s = next_arrival_s
            policy.arrive(jobs[arrivals])
            arrivals += 1
        began = time.perf_counter()
        while (placed := policy.start_next(now_s)) is not None:
            job, worker, is_load = placed
            started[job.number] += 1
            run_s = job.run_s + is_load * day.load_s
            outcome.waits_s.append(now_s - job.at_s)
            outcome.num_loads += is_load
            outcome.busy_s += run_s
            heapq.heappush(events, (now_s + run_s, next(numbers), worker))
        change_s = policy.next_change_s(now_s)
        outcome.deciding_s += time.perf_counter() - began
        if change_s is not None and now_s + change_s > looked_s:
            looked_s = now_s + change_s
            heapq.heappush(events, (looked_s, next(numbers), None))
        outcome.end_s = now_s
    if set(started) - {1}:
        raise RuntimeError(f"{started.count(0)} jobs were lost, {len(started) - started.count(0) - started.count(1)} ran more than once")
    return outcome


def describe(day: Day, outcomes: dict[str, Outcome]) -> str:
    """The report as Markdown."""
    rows = [
        ("jobs", lambda one: f"{len(one.waits_s):,}"),
        ("wait p50", lambda one: f"{one.percentile(0.5):.2f} s"),
        ("wait p99", lambda one: f"{one.percentile(0.99):.2f} s"),
        ("longest wait", lambda one: f"{max(one.waits_s):.1f} s"),
        ("loads of a checkpoint", lambda one: f"{one.num_loads:,}"),
        ("workers' time in use", lambda one: f"{one.busy_s / (day.num_workers * one.end_s):.1%}"),
        ("time to decide, per job", lambda one: f"{one.deciding_s / len(one.waits_s) * 1e6:.0f} us"),
    ]
    head = f"| | {' | '.join(outcomes)} |\n|---|{'---|' * len(outcomes)}\n"
    body = "".join(f"| {name} | {' | '.join(show(one) for one in outcomes.values())} |\n" for name, show in rows)
    ours, other = outcomes.values()
    avoided = 1 - ours.num_loads / other.num_loads if other.num_loads else 0.0
    what = (
        f"{day.num_workers:,} made-up workers of equal speed, {day.num_jobs:,} jobs a day in a daily rhythm (busiest hour 1.6 times the mean), "
        f"{day.num_checkpoints} checkpoints asked for in proportion to 1/k, jobs of {day.job_s:g} s on average (lognormal), "
        f"{day.load_s:g} s per load, seed {day.seed}."
    )
    return f"{what}\n\n{head}{body}\nLoads avoided against round-robin: {avoided:.1%}. No job was lost or run twice.\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.cluster_simulation", description=__doc__.split("\n\n", maxsplit=1)[0])
    defaults = Day()
    for name in ("num_workers", "num_jobs", "num_checkpoints", "seed"):
        parser.add_argument(f"--{name.removeprefix('num_')}", dest=name, type=int, default=getattr(defaults, name))
    for name in ("job_s", "load_s"):
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, type=float, default=getattr(defaults, name))
    parser.add_argument("--report", type=Path)
    ns = vars(parser.parse_args(argv))
    report = ns.pop("report")
    day = Day(**ns)
    jobs = list(make_jobs(day))
    text = describe(day, {"our router": simulate(day, jobs, OurRouting(day)), "round-robin": simulate(day, jobs, RoundRobin(day))})
    if report is not None:
        command = f"python -m tools.cluster_simulation --workers {day.num_workers} --jobs {day.num_jobs} --report {report.as_posix()}"
        report.write_text(f"# cluster_simulation\n\n`{command}`, Python {platform.python_version()}\n\n{text}", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
