"""The same jobs in two checkouts, in turns: `python -m tools.compare_trees BEFORE AFTER replicas:4 layers:2` prints a Markdown table.

One process for each tree stays loaded; the trees take turns within each round, and every other round goes backwards. Timed is the UNet phase of
one job over two CPU slots of one core each (`benchmarks/_multi_slot.py` of the tree itself). A job is STRATEGY:IMAGES.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tools.measure import order_of_round, paired_ratio

NUM_ROUNDS, NUM_STEPS, SIDE_PX = 7, 4, 256
_CHILD = """
import json, sys
from benchmarks._multi_slot import TWO_SLOTS, UNET_PHASE, make_application, run_job, use_slots
app = make_application()
use_slots(TWO_SLOTS)
for line in sys.stdin:
    strategy, images, steps, side = json.loads(line)
    metrics, _ = run_job(app, strategy, num_images=images, num_steps=steps, side_px=side)
    print("ANSWER", json.dumps(metrics[UNET_PHASE]), flush=True)
"""


class TreeProcess:
    """A process in a checkout that does jobs one by one."""

    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}
        )

    def run(self, strategy: str, num_images: int) -> float:
        """Seconds of a job. Raises: RuntimeError if the process ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([strategy, num_images, NUM_STEPS, SIDE_PX]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return float(line.split()[1])
        raise RuntimeError(f"the process of a tree ended with code {self._process.wait()}; what it said stands above.")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(trees: Mapping[str, TreeProcess], jobs: Sequence[tuple[str, int]], num_rounds: int = NUM_ROUNDS) -> Iterator[str]:
    """A Markdown row per job, as soon as it is measured: medians, the median of the ratios within a round, and all numbers."""
    yield "| job | before, median s | after, median s | after / before | its min..max | before s | after s |"
    yield "|---|--:|--:|--:|---|---|---|"
    for job in jobs:
        times: dict[str, list[float]] = {name: [] for name in trees}
        for name in trees:
            trees[name].run(*job)
        for index in range(num_rounds):
            for name in order_of_round(list(trees), index):
                times[name].append(trees[name].run(*job))
        before_s, after_s = times["before"], times["after"]
        ratio, low, high = paired_ratio(after_s, before_s)
        raw = " | ".join(" ".join(f"{value:.3g}" for value in one) for one in (before_s, after_s))
        medians = f"{statistics.median(before_s):.3g} | {statistics.median(after_s):.3g}"
        yield f"| {job[0]}, {job[1]} images | {medians} | {ratio:.3f} | {low:.3f}..{high:.3f} | {raw} |"


def main(words: Sequence[str]) -> None:
    before, after, *names = words
    jobs = [(strategy, int(images)) for strategy, _, images in (name.partition(":") for name in names)]
    trees = {"before": TreeProcess(Path(before)), "after": TreeProcess(Path(after))}
    try:
        for line in compare(trees, jobs):
            print(line, flush=True)
    finally:
        for tree in trees.values():
            tree.close()


if __name__ == "__main__":
    main(sys.argv[1:])
