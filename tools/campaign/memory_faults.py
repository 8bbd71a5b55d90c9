"""Out-of-memory faults at every n-th allocation of a guided job, under each plan: same picture or a clear failure, and a correct next job.

python -m tools.campaign.memory_faults --faults 1000 --per-job 5 --progress faults.jsonl
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from backend.devices.virtual_device import Faults
from backend.memory.errors import OutOfMemory
from tools.campaign.guided_job import Bed, Sound, guided_bed
from tools.campaign.progress import Progress
from tools.campaign.reporting import PlanCampaign, add_plan_arguments, run_plans

_LASTING = 10**9
SAME, CLEAR, NOT_REACHED, OTHER = "same picture", "clear failure", "not reached", "other"
QUESTION = (
    "Out-of-memory faults at every n-th allocation of a job of two pictures with ControlNet, LoRA and hires fix on "
    "virtual GPUs: is the picture the same (within one grey level) or the failure clear (every device named), is "
    "the next job right, and do bytes and threads come back? In one job of four the fault lasts to the end."
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a job's faults occur: a device and allocation numbers on it. One that `lasts` also hits all later allocations."""

    slot: int
    at: tuple[int, ...]
    lasts: bool = False

    def __str__(self) -> str:
        return f"slot {self.slot}, allocations {', '.join(map(str, self.at))}{' and all behind it' if self.lasts else ''}"

    def faults(self) -> Faults:
        """The faults in the device's form."""
        return Faults(out_of_memory_at=range(self.at[0], _LASTING) if self.lasts else frozenset(self.at))


def count_jobs(num_faults: int, per_job: int) -> int:
    """How many jobs have that many faults: `per_job` in three of four, one in the fourth."""
    return -(-num_faults * 4 // (3 * per_job + 1))


def place_faults(num_faults: int, counts: Sequence[int], per_job: int = 1) -> list[Place]:
    """Jobs with `num_faults` in total, distributed over the devices in turn and spread over the `counts` allocations of a job on each device.

    Three of four jobs have `per_job` faults far from each other, the fourth has one that lasts."""
    slots, jobs = len(counts), count_jobs(num_faults, per_job)
    rounds = -(-jobs // slots)
    places = []
    for number in range(jobs):
        slot, turn = number % slots, number // slots
        at = tuple(1 + counts[slot] * (turn + place * rounds) // (rounds * per_job) for place in range(per_job))
        lasts = turn % 4 == 3
        places.append(Place(slot=slot, at=at[turn // 4 % per_job :][:1] if lasts else at, lasts=lasts))
    return places


def run_plan(plan: str, num_faults: int, progress: Progress | None = None, *, per_job: int = 1) -> Progress:
    """Run jobs with `num_faults` in total, and a normal job after each. Cases in `progress` are not repeated."""
    progress = progress or Progress()
    left = [number for number in range(count_jobs(num_faults, per_job)) if number not in progress.done(plan)]
    if not left:
        return progress
    with guided_bed(plan) as bed:
        sound = bed.settle()
        places = place_faults(num_faults, _count_allocations(bed), per_job)
        for number in left:
            started, place = time.perf_counter(), places[number]
            result, struck, found = _disturb(bed, place, sound)
            found += [f"after {place}: {text}" for text in bed.check_next(sound)]
            progress.add(plan, number, result, found, time.perf_counter() - started, struck=struck)
        if found := bed.check_emptied():
            progress.add(plan, -1, OTHER, found, 0.0, struck=0)
    return progress


def _count_allocations(bed: Bed) -> list[int]:
    for device in bed.devices:
        device.set_faults(Faults())
    bed.picture(bed.submit())
    counts = [max(device.num_allocations, 1) for device in bed.devices]
    for device in bed.devices:
        device.set_faults(None)
    return counts


def _disturb(bed: Bed, place: Place, sound: Sound) -> tuple[str, int, list[str]]:
    """Run one job with faults; returns its result, the number of faults hit (one that lasts counts once), and broken promises."""
    device = bed.devices[place.slot]
    device.set_faults(place.faults())
    result, found = _run_disturbed(bed, place, sound)
    struck = min(device.num_refused, 1) if place.lasts else device.num_refused
    device.set_faults(None)
    return result if struck else NOT_REACHED, struck, found


def _run_disturbed(bed: Bed, place: Place, sound: Sound) -> tuple[str, list[str]]:
    try:
        difference = bed.differs(bed.picture(bed.submit()), sound)
    except OutOfMemory as error:
        names_all = all(f"vgpu:{index} " in str(error) for index in range(len(bed.devices)))
        return CLEAR, [] if names_all else [f"{place}: the failure names not every device: {error}"]
    except Exception as error:  # noqa: BLE001 - any other error is what the campaign looks for
        return OTHER, [f"{place}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    return SAME, [f"{place}: another picture, by {difference}"] if difference else []


def summarize(progress: Progress) -> list[dict[str, object]]:
    """One row of the report per plan."""
    rows: list[dict[str, object]] = []
    for plan in dict.fromkeys(case.plan for case in progress.cases):
        cases = [case for case in progress.of(plan) if case.number >= 0]
        counts = Counter(case.result for case in cases)
        counted = {name: counts[name] for name in (SAME, CLEAR, NOT_REACHED)}
        struck = sum(case.struck for case in cases)
        rows.append({"plan": plan, "faults": struck, "jobs": len(cases), **counted, "found": sum(len(case.found) for case in progress.of(plan))})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if any promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=1000, help="total number of faults, divided among the plans")
    parser.add_argument("--per-job", type=int, default=1, help="faults per job, far from each other")
    add_plan_arguments(parser)
    chosen = parser.parse_args(arguments)
    campaign = PlanCampaign(
        name="memory_faults",
        question=QUESTION,
        command=f"python -m tools.campaign.memory_faults --faults {chosen.faults} --per-job {chosen.per_job}",
        run_plan=partial(run_plan, per_job=chosen.per_job),
        summarize=summarize,
    )
    return run_plans(campaign, chosen, chosen.faults)


if __name__ == "__main__":
    raise SystemExit(main())
