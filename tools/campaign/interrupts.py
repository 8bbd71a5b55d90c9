"""Interrupts and skips at random moments of a guided job, under each plan: nothing hangs, and the next job is right.

python -m tools.campaign.interrupts --interrupts 500
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from backend.devices.virtual_device import Faults
from tools.campaign.guided_job import PLANS, Bed, guided_bed
from tools.campaign.memory_faults import GREY_LEVELS, SLACK_BYTES, check_emptied
from tools.campaign.reporting import write_report

_LOOK_S = 0.0005
QUESTION = (
    "Interrupts and skips at random operations of a job of two pictures with ControlNet, LoRA and hires fix on "
    "virtual GPUs: does anything hang, is the next job right, and do bytes and threads come back?"
)


@dataclass
class Outcome:
    """What became of the interrupts under one plan."""

    plan: str
    counts: Counter[str] = field(default_factory=Counter)
    found: list[str] = field(default_factory=list)

    def row(self) -> dict[str, object]:
        """A line of the report."""
        counted = {name: self.counts[name] for name in ("interrupt", "skip", "ended with pictures", "ended without")}
        return {"plan": self.plan, **counted, "found": len(self.found)}


def run_plan(plan: str, num_interrupts: int, *, seed: int = 0) -> Outcome:
    """`num_interrupts` jobs that are stopped at a random operation of their first device, and a whole one after each."""
    chance, outcome = random.Random(f"{plan} {seed}"), Outcome(plan)
    with guided_bed(plan) as bed:
        for _ in range(3):  # the first jobs measure, and cut the network anew
            expected = bed.picture(bed.submit())
        levels = bed.unheld_bytes(), bed.num_threads()
        num_operations = _count_operations(bed)
        for _ in range(num_interrupts):
            kind, at = chance.choice(("interrupt", "skip")), chance.randrange(num_operations)
            _stop_one(bed, outcome, kind, at)
            _check_next(bed, outcome, f"{kind} at operation {at}", expected, levels)
        check_emptied(bed, outcome.found)
    return outcome


def _count_operations(bed: Bed) -> int:
    bed.devices[0].set_faults(Faults())
    bed.picture(bed.submit())
    return max(bed.devices[0].num_operations, 1)


def _stop_one(bed: Bed, outcome: Outcome, kind: str, at: int) -> None:
    """A job that is stopped when its first device has begun operation `at`."""
    device, over = bed.devices[0], threading.Event()
    device.set_faults(Faults())
    outcome.counts[kind] += 1
    job = bed.submit()

    def stop() -> None:
        while device.num_operations < at and not over.wait(_LOOK_S):
            pass
        getattr(bed.app.state, kind)()

    watcher = threading.Thread(target=stop, name="stops the job")
    watcher.start()
    try:
        outcome.counts["ended with pictures" if len(bed.picture(job)) else "ended without"] += 1
    except Exception as error:  # noqa: BLE001 - whatever comes is what the campaign looks for
        outcome.found.append(f"{kind} at operation {at}: {type(error).__name__}: {error}")
    finally:
        over.set()
        watcher.join()
        device.set_faults(None)


def _check_next(bed: Bed, outcome: Outcome, where: str, expected: np.ndarray, levels: tuple[int, int]) -> None:
    picture = bed.picture(bed.submit())
    if picture.shape != expected.shape or int(np.abs(picture - expected).max()) > GREY_LEVELS:
        outcome.found.append(f"after {where}: the next job's picture differs")
    if (grown := bed.unheld_bytes() - levels[0]) > SLACK_BYTES:
        outcome.found.append(f"after {where}: {grown} bytes more than before are on the devices and belong to no model")
    if (more := bed.num_threads() - levels[1]) > 0:
        outcome.found.append(f"after {where}: {more} threads more than before")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where something was not as promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interrupts", type=int, default=500, help="interrupts and skips in all, shared among the plans")
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)  # every failed job would be told at length
    started = time.perf_counter()
    outcomes = [run_plan(plan, max(1, chosen.interrupts // len(chosen.plans)), seed=chosen.seed) for plan in chosen.plans]
    found = [f"{one.plan}: {text}" for one in outcomes for text in one.found]
    path = write_report(
        "interrupts",
        question=QUESTION,
        command=f"python -m tools.campaign.interrupts --interrupts {chosen.interrupts} --plans {' '.join(chosen.plans)} --seed {chosen.seed}",
        rows=[one.row() for one in outcomes],
        found=found,
        seconds=time.perf_counter() - started,
    )
    sys.stdout.write(path.read_text(encoding="utf-8"))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
