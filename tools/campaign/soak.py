"""Many jobs one after another: the server's memory, threads and open files must not grow.

python -m tools.campaign.soak --jobs 500
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import psutil

from tools.campaign.full_server import full_server, report

WARM_UP_SHARE = 0.2
GROWTH_BYTES = 64 << 20


def measure(process: psutil.Process) -> tuple[int, int, int]:
    """(bytes of RAM, threads, open files)."""
    return process.memory_info().rss, process.num_threads(), process.num_fds()


def run(jobs: int, samples: int = 10) -> list[tuple[int, int, int, int]]:
    """(jobs done, bytes, threads, open files) at `samples` points in time."""
    found = []
    with tempfile.TemporaryDirectory() as folder, full_server(Path(folder) / "data", Path(folder) / "log.txt") as server:
        process = psutil.Process(server.process.pid)
        for number in range(1, jobs + 1):
            server.txt2img(seed=number, steps=1 + number % 3, prompt="a cat " * (1 + number % 40), batch_size=1 + number % 2)
            if number % max(jobs // samples, 1) == 0:
                found.append((number, *measure(process)))
    return found


def is_flat(found: list[tuple[int, int, int, int]]) -> bool:
    """Whether nothing grew after the first fifth."""
    settled = found[int(len(found) * WARM_UP_SHARE) :]
    first, last = settled[0], settled[-1]
    return last[1] - first[1] < GROWTH_BYTES and last[2] - first[2] <= 4 and last[3] - first[3] <= 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=500)
    given = parser.parse_args()
    found = run(given.jobs)
    rows = ["| Jobs | MiB | Threads | Open files |", "|---|---|---|---|", *(f"| {n} | {ram / 2**20:.1f} | {th} | {fd} |" for n, ram, th, fd in found)]
    report("soak", "Many jobs one after the other", f"python -m tools.campaign.soak --jobs {given.jobs}", rows)
    return 0 if is_flat(found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
