"""Out-of-memory faults at every n-th allocation of a guided job, under each plan: the same picture or a clear failure, and the next job is right.

python -m tools.campaign.memory_faults --faults 1000
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from backend.devices.virtual_device import Faults
from backend.memory.errors import OutOfMemory
from tools.campaign.guided_job import PLANS, Bed, guided_bed
from tools.campaign.reporting import write_report

SLACK_BYTES = 2**20
GREY_LEVELS = 1
"""Conditions that run one by one round as a batch of one does."""
_LASTING = 10**6
QUESTION = (
    "Out-of-memory faults at every n-th allocation of a job of two pictures with ControlNet, LoRA and hires fix on "
    "virtual GPUs: is the picture the same (within one grey level) or the failure clear (every device named), is "
    "the next job right, and do bytes and threads come back? One fault in four lasts to the end of its job."
)


@dataclass
class Outcome:
    """What became of the faults under one plan. `found` are those that were not as promised."""

    plan: str
    counts: Counter[str] = field(default_factory=Counter)
    found: list[str] = field(default_factory=list)
    num_allocations: int = 0

    def row(self) -> dict[str, object]:
        """A line of the report."""
        counted = {name: self.counts[name] for name in ("same picture", "clear failure", "not reached")}
        return {
            "plan": self.plan,
            "faults": sum(self.counts.values()),
            "allocations a job": self.num_allocations,
            **counted,
            "found": len(self.found),
        }


def run_plan(plan: str, num_faults: int) -> Outcome:
    """`num_faults` jobs with a fault each, and a sound one after each. Every other fault is a single allocation, the rest last to the job's end."""
    outcome = Outcome(plan)
    with guided_bed(plan) as bed:
        for _ in range(3):  # the first jobs measure, and cut the network anew
            expected = bed.picture(bed.submit())
        levels = bed.unheld_bytes(), bed.num_threads()
        counts = _count_allocations(bed)
        outcome.num_allocations = sum(counts)
        for number in range(num_faults):
            slot = number % len(bed.devices)
            at = 1 + counts[slot] * (number // len(bed.devices)) * len(bed.devices) // max(num_faults, 1)
            _disturb(bed, outcome, slot, at, lasts=number // len(bed.devices) % 4 == 3, expected=expected)
            _check_next(bed, outcome, f"slot {slot}, allocation {at}", expected, levels)
        check_emptied(bed, outcome.found)
    return outcome


def _count_allocations(bed: Bed) -> list[int]:
    for device in bed.devices:
        device.set_faults(Faults())
    bed.picture(bed.submit())
    return [max(device.num_allocations, 1) for device in bed.devices]


def _disturb(bed: Bed, outcome: Outcome, slot: int, at: int, *, lasts: bool, expected: np.ndarray) -> None:
    """One job with a fault: a single one, or one that `lasts` for all allocations behind it."""
    places = frozenset(range(at, at + _LASTING)) if lasts else frozenset({at})
    bed.devices[slot].set_faults(Faults(out_of_memory_at=places))
    where = f"slot {slot}, allocation {at}{' and all behind it' if lasts else ''}"
    try:
        difference = int(np.abs(bed.picture(bed.submit()) - expected).max())
    except OutOfMemory as error:
        outcome.counts["clear failure"] += 1
        if not all(f"vgpu:{index} " in str(error) for index in range(len(bed.devices))):
            outcome.found.append(f"{where}: the failure names not every device: {error}")
    except Exception as error:  # noqa: BLE001 - whatever else comes is what the campaign looks for
        outcome.counts["unclear failure"] += 1
        outcome.found.append(f"{where}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    else:
        reached = bed.devices[slot].num_allocations >= at
        outcome.counts["same picture" if reached else "not reached"] += 1
        if difference > GREY_LEVELS:
            outcome.found.append(f"{where}: another picture, by {difference} grey levels")
    finally:
        for device in bed.devices:
            device.set_faults(None)


def _check_next(bed: Bed, outcome: Outcome, where: str, expected: np.ndarray, levels: tuple[int, int]) -> None:
    """The next job's picture, and what it leaves on devices and in threads."""
    difference = int(np.abs(bed.picture(bed.submit()) - expected).max())
    if difference > GREY_LEVELS:
        outcome.found.append(f"after {where}: the next job's picture differs by {difference} grey levels")
    if (grown := bed.unheld_bytes() - levels[0]) > SLACK_BYTES:
        outcome.found.append(f"after {where}: {grown} bytes more than before are on the devices and belong to no model")
    if (more := bed.num_threads() - levels[1]) > 0:
        outcome.found.append(f"after {where}: {more} threads more than before")


def check_emptied(bed: Bed, found: list[str]) -> None:
    """When everything is unloaded, the devices are empty."""
    if (left := bed.unload()) > SLACK_BYTES:
        found.append(f"after unloading everything {left} bytes stay on the devices")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where something was not as promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=1000, help="faults in all, shared among the plans")
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS))
    chosen = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)  # every failed job would be told at length
    started = time.perf_counter()
    outcomes = [run_plan(plan, max(1, chosen.faults // len(chosen.plans))) for plan in chosen.plans]
    found = [f"{one.plan}: {text}" for one in outcomes for text in one.found]
    path = write_report(
        "memory_faults",
        question=QUESTION,
        command=f"python -m tools.campaign.memory_faults --faults {chosen.faults} --plans {' '.join(chosen.plans)}",
        rows=[one.row() for one in outcomes],
        found=found,
        seconds=time.perf_counter() - started,
    )
    sys.stdout.write(path.read_text(encoding="utf-8"))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
