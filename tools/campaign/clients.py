"""Many clients use one server for a while; every picture is compared with the result of the same request made alone.

python -m tools.campaign.clients --clients 32 --seconds 300
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
import urllib.error
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.campaign.full_server import FullServer, Start, full_server, report, start_process

KINDS: tuple[dict[str, Any], ...] = tuple(
    {"seed": seed, "prompt": prompt, "steps": steps} for seed, prompt, steps in zip(range(8), ("a red circle", "a blue square") * 4, (1, 2, 3, 4) * 2)
)


def picture_of(server: FullServer, kind: dict[str, Any]) -> str:
    """Digest of the picture, including metadata."""
    return hashlib.sha256(server.txt2img(**kind)["images"][0].encode()).hexdigest()


def run_client(server: FullServer, expected: list[str], number: int, until_s: float) -> Counter[str]:
    """Send one request after another; returns the outcomes."""
    found: Counter[str] = Counter()
    while time.monotonic() < until_s:
        index = (number + found.total()) % len(KINDS)
        try:
            found["same" if picture_of(server, KINDS[index]) == expected[index] else "different"] += 1
        except urllib.error.HTTPError as error:
            with error:
                found[f"status {error.code}"] += 1
        except OSError as error:
            found[type(error).__name__] += 1
    return found


def run(clients: int, seconds: float, *, start: Start = start_process) -> Counter[str]:
    """Combined outcomes of all clients."""
    with tempfile.TemporaryDirectory() as folder, full_server(Path(folder) / "data", Path(folder) / "log.txt", start=start) as server:
        expected = [picture_of(server, kind) for kind in KINDS]
        until_s = time.monotonic() + seconds
        with ThreadPoolExecutor(clients) as pool:
            parts = list(pool.map(lambda number: run_client(server, expected, number, until_s), range(clients)))
        total: Counter[str] = sum(parts, Counter())
        total["clients without an answer"] = sum(1 for part in parts if not part["same"])
        return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300)
    given = parser.parse_args()
    found = run(given.clients, given.seconds)
    command = f"python -m tools.campaign.clients --clients {given.clients} --seconds {given.seconds:g}"
    rows = ["| Answers | Number |", "|---|---|", *(f"| {what} | {number} |" for what, number in sorted(found.items()))]
    report("clients", "Many clients at once, pictures compared with a serial run", command, rows)
    return 0 if set(+found) == {"same"} else 1


if __name__ == "__main__":
    raise SystemExit(main())
