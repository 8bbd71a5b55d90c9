"""kill -9 while pictures and settings are saved: nothing may be half-written or lost, and nothing left over after a restart.

The whole server, page included, is forked for each round from a process that has imported everything. A client saves pictures while another writes
settings. A third of the kills come at a random moment, a third when a picture's unfinished file is there, a third when that of the settings is.

python -m tools.campaign.kills --rounds 100
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from backend.unfinished_files import is_unfinished_name
from tools.campaign.forked import fork_process
from tools.campaign.full_server import FullServer, report, start_server

FLAGS = ("--api",)
SIDE_PX = 128
LOOK_S = 0.0002
GONE = (OSError, http.client.HTTPException, ValueError)
"""What a client sees of a server that is killed: no connection, half an answer, an answer that is no JSON."""
MOMENTS = ("at random", "picture unfinished", "settings unfinished")
LONGEST_WAIT_S = 20.0
"""For the first picture, and for an unfinished file to be seen."""
REST_S = 2.5
"""A start keeps files written in the two seconds before it: another run may be writing them."""


@dataclass
class Busy:
    """Clients of one server: the numbers of pictures and settings that were answered, and the last setting that was sent."""

    server: FullServer
    saved: int = 0
    sent: int = 0
    accepted: int = 0
    pictured: threading.Event = field(default_factory=threading.Event)

    def save_pictures(self) -> None:
        """Save one after another until the server is gone."""
        with contextlib.suppress(*GONE):
            while True:
                self.server.txt2img(save_images=True, seed=self.saved, steps=1, width=SIDE_PX, height=SIDE_PX)
                self.saved += 1
                self.pictured.set()

    def write_settings(self) -> None:
        """Write one after another until the server is gone."""
        self.pictured.wait()
        with contextlib.suppress(*GONE):
            while True:
                self.sent = 20 + (self.sent - 19) % 80
                self.server.post("/sdapi/v1/options", {"jpeg_quality": self.sent})
                self.accepted = self.sent


@contextlib.contextmanager
def busy_clients(server: FullServer) -> Iterator[Busy]:
    """Two clients at work, from the first picture on until the server is killed. The server is gone afterwards."""
    busy = Busy(server)
    threads = [threading.Thread(target=work) for work in (busy.save_pictures, busy.write_settings)]
    for thread in threads:
        thread.start()
    try:
        busy.pictured.wait(LONGEST_WAIT_S)
        yield busy
    finally:
        server.kill()
        busy.pictured.set()
        for thread in threads:
            thread.join()


def wait_for(moment: str, data_dir: Path, rng: random.Random) -> None:
    """Sleep until the kill is due: a random part of a second, or until an unfinished picture or settings file is there."""
    if moment == "at random":
        time.sleep(rng.uniform(0, 1))
        return
    folders = [path for path in (data_dir / "outputs").rglob("*") if path.is_dir()] if moment.startswith("picture") else [data_dir]
    deadline = time.monotonic() + LONGEST_WAIT_S
    while time.monotonic() < deadline and not any(is_unfinished_name(path.name) for folder in folders for path in folder.iterdir()):
        time.sleep(LOOK_S)


def pictures_in(data_dir: Path) -> list[Path]:
    """Pictures under their final names."""
    return [path for path in (data_dir / "outputs").rglob("*.png") if not is_unfinished_name(path.name)]


def faults_in(data_dir: Path) -> list[str]:
    """Pictures and settings that cannot be read."""
    faults = []
    for path in pictures_in(data_dir):
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError, ValueError) as error:
            faults.append(f"{path.name}: {error}")
    try:
        _settings(data_dir)
    except ValueError as error:
        faults.append(f"config.json: {error}")
    return faults


def _settings(data_dir: Path) -> dict[str, Any]:
    """The saved settings; none if nothing was saved. Raises ValueError."""
    path = data_dir / "config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def lost_in(data_dir: Path, busy: Busy, num_before: int) -> list[str]:
    """What a client was told is saved, and is not."""
    lost = []
    if (there := len(pictures_in(data_dir)) - num_before) < busy.saved:
        lost.append(f"{busy.saved} pictures were answered, {there} are there")
    if busy.accepted and (value := _settings(data_dir).get("jpeg_quality")) not in (busy.accepted, busy.sent):
        lost.append(f"jpeg_quality is {value} after {busy.accepted} was answered and {busy.sent} sent")
    return lost


def rests_in(data_dir: Path) -> list[str]:
    """Temporary files left by a killed run."""
    return [str(path.relative_to(data_dir)) for path in data_dir.rglob("*") if path.is_file() and (path.suffix == ".tmp" or ".tmp." in path.name)]


@dataclass
class Result:
    """Of all rounds: kills per moment, pictures, settings written, faults, unfinished files after kills, and those that a start left."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOMENTS, 0))
    pictures: int = 0
    faults: list[str] = field(default_factory=list)
    rests: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOMENTS, 0))
    stale: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, object]]:
        """Rows of the report."""
        rows: list[tuple[str, object]] = [(f"kills, {moment}", number) for moment, number in self.kills.items()]
        rows += [(f"kills that left an unfinished file, {moment}", number) for moment, number in self.rests.items()]
        rows += [("pictures, all read", self.pictures), ("half-written or lost", self.faults or 0)]
        return [*rows, ("unfinished files after a restart", self.stale or 0)]


def run(rounds: int, seed: int = 1) -> Result:
    """Kill `rounds` servers on one data folder, then start and end one more."""
    rng, result, rests = random.Random(seed), Result(), set[str]()
    with tempfile.TemporaryDirectory() as folder:
        data_dir, log_file = Path(folder) / "data", Path(folder) / "log.txt"
        for number in range(rounds):
            moment, num_before = MOMENTS[number % len(MOMENTS)], len(pictures_in(data_dir))
            with busy_clients(start_server(data_dir, log_file, FLAGS, start=fork_process)) as busy:
                wait_for(moment, data_dir, rng)
            found = [*faults_in(data_dir), *([] if busy.saved else ["no picture before the kill"])]
            found += lost_in(data_dir, busy, num_before)
            result.faults += [f"round {number}, {moment}: {text}" for text in found]
            left = set(rests_in(data_dir))
            result.kills[moment] += 1
            result.rests[moment] += bool(left - rests)
            rests = left
        time.sleep(REST_S)
        server = start_server(data_dir, log_file, FLAGS, start=fork_process)
        server.txt2img(steps=1, width=SIDE_PX, height=SIDE_PX)
        if code := server.end():
            result.faults.append(f"the last server ended with {code}")
        result.stale = rests_in(data_dir)
        result.pictures = len(pictures_in(data_dir))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    given = parser.parse_args()
    result = run(given.rounds)
    rows = ["| What | Found |", "|---|---|", *(f"| {what} | {value} |" for what, value in result.rows())]
    report("kills", "kill -9 while saving pictures and settings", f"python -m tools.campaign.kills --rounds {given.rounds}", rows)
    return 1 if result.faults or result.stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
