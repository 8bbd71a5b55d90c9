"""Interrupts and skips at random points of a guided job, under each plan: nothing may hang, and the next job must be correct.

python -m tools.campaign.interrupts --interrupts 500 --progress interrupts.jsonl
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial

from backend.devices.virtual_device import Faults
from tools.campaign.guided_job import Bed, guided_bed
from tools.campaign.progress import Progress
from tools.campaign.reporting import PlanCampaign, add_plan_arguments, run_plans

_LOOK_S = 0.0005
KINDS = ("interrupt", "skip")
QUESTION = (
    "Interrupts and skips at random operations of a job of two pictures with ControlNet, LoRA and hires fix on "
    "virtual GPUs: does anything hang, is the next job right, and do bytes and threads come back?"
)


def run_plan(plan: str, num_interrupts: int, progress: Progress | None = None, *, seed: int = 0, whole_after: int = 1) -> Progress:
    """Stop `num_interrupts` jobs at a random operation of one of their devices, and run a whole job after every `whole_after` of them.

    Cases in `progress` are not repeated."""
    progress = progress or Progress()
    left = [number for number in range(num_interrupts) if number not in progress.done(plan)]
    if not left:
        return progress
    with guided_bed(plan) as bed:
        sound = bed.settle()
        counts = _count_operations(bed)
        for number in left:
            chance, started = random.Random(f"{plan} {seed} {number}"), time.perf_counter()
            kind, slot = chance.choice(KINDS), chance.randrange(len(counts))
            at = chance.randrange(counts[slot])
            ended, found = _stop_one(bed, kind, slot, at)
            if number % whole_after == whole_after - 1:
                found += [f"after a {kind} at operation {at} of slot {slot}: {text}" for text in bed.check_next(sound)]
            progress.add(plan, number, f"{kind}, {ended}", found, time.perf_counter() - started)
        if found := [*bed.check_next(sound), *bed.check_emptied()]:
            progress.add(plan, -1, "unloading", found, 0.0)
    return progress


def _count_operations(bed: Bed) -> list[int]:
    for device in bed.devices:
        device.set_faults(Faults())
    bed.picture(bed.submit())
    return [max(device.num_operations, 1) for device in bed.devices]


def _stop_one(bed: Bed, kind: str, slot: int, at: int) -> tuple[str, list[str]]:
    """Stop a job when its device `slot` starts operation `at`; returns how it ended, and broken promises."""
    device, over = bed.devices[slot], threading.Event()
    device.set_faults(Faults())
    job = bed.submit()

    def stop() -> None:
        while device.num_operations < at and not over.wait(_LOOK_S):
            pass
        getattr(bed.app.state, kind)()

    watcher = threading.Thread(target=stop, name="stops the job")
    watcher.start()
    try:
        return "with pictures" if len(bed.picture(job)) else "without", []
    except Exception as error:  # noqa: BLE001 - any error is what the campaign looks for
        return "failed", [f"{kind} at operation {at} of slot {slot}: {type(error).__name__}: {error}"]
    finally:
        over.set()
        watcher.join()
        device.set_faults(None)


def summarize(progress: Progress) -> list[dict[str, object]]:
    """One row of the report per plan."""
    rows: list[dict[str, object]] = []
    for plan in dict.fromkeys(case.plan for case in progress.cases):
        cases = [case for case in progress.of(plan) if case.number >= 0]
        counts = Counter(part for case in cases for part in case.result.split(", "))
        counted = {name: counts[name] for name in (*KINDS, "with pictures", "without")}
        rows.append({"plan": plan, **counted, "found": sum(len(case.found) for case in progress.of(plan))})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if any promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interrupts", type=int, default=500, help="total number of interrupts and skips, divided among the plans")
    parser.add_argument("--whole-after", type=int, default=1, help="number of stopped jobs before a whole job is compared")
    parser.add_argument("--seed", type=int, default=0)
    add_plan_arguments(parser)
    chosen = parser.parse_args(arguments)
    campaign = PlanCampaign(
        name="interrupts",
        question=QUESTION,
        command=f"python -m tools.campaign.interrupts --interrupts {chosen.interrupts} --whole-after {chosen.whole_after}",
        run_plan=partial(run_plan, seed=chosen.seed, whole_after=chosen.whole_after),
        summarize=summarize,
    )
    return run_plans(campaign, chosen, chosen.interrupts)


if __name__ == "__main__":
    raise SystemExit(main())
