"""kill -9 at random moments while pictures and settings are saved: nothing may be half-written, and nothing left over after a restart.

python -m tools.campaign.kills --rounds 100
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
import urllib.error
from pathlib import Path

from PIL import Image

from tools.campaign.full_server import FullServer, report, start_server


def keep_busy(server: FullServer, stop: threading.Event) -> None:
    """Save pictures and write settings until the server is gone."""
    number = 0
    while not stop.is_set():
        number += 1
        try:
            server.post("/sdapi/v1/options", {"jpeg_quality": 50 + number % 50})
            server.txt2img(save_images=True, seed=number, steps=1)
        except (urllib.error.URLError, OSError, ValueError):
            return


def faults_in(data_dir: Path) -> list[str]:
    """Pictures and settings that cannot be read."""
    faults = []
    for path in (data_dir / "outputs").rglob("*.png"):
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError, ValueError) as error:
            faults.append(f"{path.name}: {error}")
    config = data_dir / "config.json"
    try:
        if config.exists():
            json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        faults.append(f"config.json: {error}")
    return faults


def rests_in(data_dir: Path) -> list[str]:
    """Temporary files left by a killed run."""
    return [str(path.relative_to(data_dir)) for path in data_dir.rglob("*") if path.is_file() and (path.suffix == ".tmp" or ".tmp." in path.name)]


def run(rounds: int, seed: int = 1) -> dict[str, int | list[str]]:
    """Results of the rounds: pictures, faults, and leftovers after one more start."""
    rng = random.Random(seed)
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        data_dir, log_file = Path(folder) / "data", Path(folder) / "log.txt"
        for _ in range(rounds):
            server = start_server(data_dir, log_file)
            stop = threading.Event()
            client = threading.Thread(target=keep_busy, args=(server, stop))
            client.start()
            time.sleep(rng.uniform(0.5, 4))
            server.kill()
            stop.set()
            client.join()
            faults += faults_in(data_dir)
        rests_before = rests_in(data_dir)
        start_server(data_dir, log_file).end()
        pictures = len(list((data_dir / "outputs").rglob("*.png")))
        return {"rounds": rounds, "pictures": pictures, "faults": faults, "rests before": len(rests_before), "rests after": rests_in(data_dir)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    given = parser.parse_args()
    found = run(given.rounds)
    rows = ["| What | Found |", "|---|---|", *(f"| {what} | {value or 0} |" for what, value in found.items())]
    report("kills", "kill -9 while saving pictures and settings", f"python -m tools.campaign.kills --rounds {given.rounds}", rows)
    return 1 if found["faults"] or found["rests after"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
