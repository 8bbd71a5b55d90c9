"""A front with workers on Ray machines of this computer, against one server alone: nothing lost, nothing made twice, every picture the same; and how
much faster two workers of one core are than one.

python -m tools.campaign.cluster faults --jobs 200 --clients 16
python -m tools.campaign.cluster stops
python -m tools.campaign.cluster speed

Needs Ray (requirements_cluster.txt). Every machine is a raylet with one core; the demo checkpoint makes the pictures.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modules.cluster.joining import worker_environment
from tools.campaign.full_server import FullServer, full_server, report, start_server

SAMPLERS = ("Euler", "Euler a", "DPM++ 2M", "DDIM")
PROMPTS = ("a red circle", "a blue square", "a green cross", "two yellow triangles")
MACHINE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
SIDE_PX = 64
READY_S = 120.0
NO_GRID = {"return_grid": False, "grid_save": False}


@dataclass
class Machines:
    """A Ray cluster of raylets on this computer."""

    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(**MACHINE))

    def remove(self) -> None:
        """The machine is gone at once, with everything on it."""
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)


@contextlib.contextmanager
def machines(folder: Path, num_machines: int) -> Iterator[Machines]:
    """A head without cores, and machines of one core each; their workers get their models from the front."""
    from ray.cluster_utils import Cluster

    flags = ["--data-dir", str(folder), "--loglevel", "WARNING"]
    os.environ.update(worker_environment(os.environ, flags))
    found = Machines(Cluster(initialize_head=True, head_node_args={**MACHINE, "num_cpus": 0}))
    try:
        for _ in range(num_machines):
            found.add()
        yield found
    finally:
        found.cluster.shutdown()


@contextlib.contextmanager
def front(address: str, folder: Path) -> Iterator[FullServer]:
    """The front of the cluster as a process of its own."""
    with full_server(folder / "front", folder / "front.log", ("--nowebui", "--cluster", address)) as server:
        yield server


def workers_of(server: FullServer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.get("/sdapi/v1/multi-gpu")["cluster"]["workers"]
    return found


def wait_for_workers(server: FullServer, number: int) -> None:
    """Wait until `number` workers are idle. Raises RuntimeError."""
    deadline_s = time.monotonic() + READY_S
    while sum(worker["state"] == "idle" for worker in workers_of(server)) < number:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{number} workers did not become idle: {[worker['state'] for worker in workers_of(server)]}")
        time.sleep(0.1)


def pixels(answer: Any) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int) for text in answer["images"]]


def make_job(number: int) -> dict[str, Any]:
    """A job of the mix: every sampler, 4 to 12 steps, 1 to 4 pictures in batches."""
    dice = random.Random(number)
    batches = dice.choice([{}, {}, {"n_iter": 2}, {"n_iter": 3}, {"batch_size": 2}])
    facts = {"seed": number, "prompt": dice.choice(PROMPTS), "sampler_name": dice.choice(SAMPLERS), "steps": dice.randint(4, 12)}
    return {**facts, **batches, "width": SIDE_PX, "height": SIDE_PX, "override_settings": NO_GRID}


def kill_a_worker(server: FullServer) -> bool:
    """SIGKILL to the process of a busy worker; whether there was one."""
    found = [worker["pid"] for worker in workers_of(server) if worker["state"] == "busy"]
    with contextlib.suppress(ProcessLookupError):  # it ended in between
        if found:
            os.kill(random.choice(found), signal.SIGKILL)
            return True
    return False


@dataclass
class Trouble:
    """Kills workers, adds machines and takes them away while jobs run. Works on the main thread, the only one on which Ray starts machines."""

    machines: Machines
    server: FullServer
    every_s: float
    counts: Counter[str] = field(default_factory=Counter)

    def run_until(self, is_over: threading.Event) -> None:
        turn = 0
        while not is_over.wait(self.every_s):
            turn += 1
            if turn % 3 == 1:
                self.counts["workers killed"] += kill_a_worker(self.server)
            elif turn % 3 == 2:
                self.machines.add()
                self.counts["machines added"] += 1
            elif len(self.machines.nodes) > 2:
                self.machines.remove()
                self.counts["machines taken away"] += 1


def run_faults(num_jobs: int, num_clients: int, every_s: float) -> tuple[list[str], bool]:
    """Rows of the report, and whether all went well."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = [make_job(number) for number in range(num_jobs)]
        with full_server(folder / "alone", folder / "alone.log") as alone:
            expected = [pixels(alone.txt2img(**job)) for job in jobs]
        with machines(folder / "worker", 2) as found, front(found.cluster.address, folder) as server:
            wait_for_workers(server, 2)
            trouble, is_over = Trouble(found, server, every_s), threading.Event()

            def ask(number: int) -> None:
                body = {**jobs[number], "force_task_id": f"task(campaign-{number})"}
                counts.update(compare(server, body, expected[number]))

            def ask_all() -> None:
                with ThreadPoolExecutor(num_clients) as pool:
                    list(pool.map(ask, range(num_jobs)))
                is_over.set()

            began_s = time.monotonic()
            clients = threading.Thread(target=ask_all, daemon=True)
            clients.start()
            trouble.run_until(is_over)
            seconds = time.monotonic() - began_s
            clients.join(60)
            cluster = server.get("/sdapi/v1/multi-gpu")["cluster"]
        saved = len(list((folder / "front" / "outputs").rglob("*.png")))
    pictures = sum(len(one) for one in expected)
    rows = [
        f"{num_jobs} jobs of {num_clients} clients in {seconds:.0f} s, {pictures} pictures; {dict(trouble.counts)}.",
        f"Pieces made again because their worker was lost: {cluster['retries']}. Loads: {cluster['loads']}.",
        f"Outcomes: {dict(counts)}. Pictures saved by the front: {saved} of {pictures}.",
    ]
    return rows, counts["same"] == num_jobs and saved == pictures


def compare(server: FullServer, body: dict[str, Any], expected: Sequence[np.ndarray]) -> list[str]:
    """ "same", or what went wrong with one job."""
    try:
        made = pixels(server.txt2img(**body, save_images=True))
    except OSError as error:
        return [f"lost ({error})"]
    if len(made) != len(expected):
        return ["another number of pictures"]
    # a batch that was taken apart may differ in the last bit of a color
    most = 1 if body.get("batch_size", 1) > 1 else 0
    return ["same" if all(np.abs(one - other).max() <= most for one, other in zip(made, expected)) else "different"]


# A worker that hangs, a front and a head that are killed


def run_stops() -> tuple[list[str], bool]:
    """Rows of the report, and whether everything ended as docs/cluster.md says."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with machines(folder / "worker", 2) as found:
            server = start_front(found.cluster.address, folder)
            wait_for_workers(server, 2)
            hang = try_hang(server)
            front = try_front(server, found.cluster.address, folder)
            head = try_head(front.server, found, folder)
    return [hang.row, front.row, head.row], hang.is_good and front.is_good and head.is_good


@dataclass(kw_only=True)
class Stop:
    """What happened; `server` is the front that runs afterwards."""

    row: str
    is_good: bool
    server: FullServer


def start_front(address: str, folder: Path) -> FullServer:
    return start_server(folder / "front", folder / "front.log", ("--nowebui", "--cluster", address))


def try_hang(server: FullServer) -> Stop:
    """SIGSTOP to a busy worker: to the front it is a machine whose network is cut."""
    alone = pixels(server.txt2img(seed=1, steps=60, width=SIDE_PX, height=SIDE_PX))
    with ThreadPoolExecutor(1) as pool:
        began_s = time.monotonic()
        job = pool.submit(server.txt2img, seed=1, n_iter=20, steps=100, width=SIDE_PX, height=SIDE_PX, override_settings=NO_GRID)
        pid = wait_for_busy_worker(server)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1)
        other = pixels(server.txt2img(seed=1, steps=60, width=SIDE_PX, height=SIDE_PX))
        made = job.result()
        seconds = time.monotonic() - began_s
        with contextlib.suppress(ProcessLookupError):  # Ray may have ended it meanwhile
            os.kill(pid, signal.SIGCONT)
    said = "Made again on" in made["info"]
    is_good = said and np.array_equal(alone[0], other[0])
    return Stop(
        row=f"A worker was stopped with a job: the job was made again elsewhere, {seconds:.0f} s in all; said beside it: {said}.",
        is_good=is_good,
        server=server,
    )


def wait_for_busy_worker(server: FullServer) -> int:
    """The process of a worker that has a job. Raises RuntimeError if none gets one."""
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        for worker in workers_of(server):
            if worker["state"] == "busy":
                return int(worker["pid"])
        time.sleep(0.02)
    raise RuntimeError("no worker got the job")


def try_front(server: FullServer, address: str, folder: Path, *, num_jobs: int = 20) -> Stop:
    """SIGKILL to the front with running and waiting jobs; the next start makes their pictures."""
    outputs = folder / "front" / "outputs"
    before = {path.name for path in outputs.rglob("*.png")}

    def ask(number: int) -> None:
        with contextlib.suppress(OSError):
            server.txt2img(seed=9000 + number, steps=40, width=SIDE_PX, height=SIDE_PX, save_images=True, override_settings=NO_GRID)

    clients = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(num_jobs)]
    for client in clients:
        client.start()
    while len(new_pictures(outputs, before)) < 3:
        time.sleep(0.02)
    server.kill()
    saved_before = len(new_pictures(outputs, before))
    server = start_front(address, folder)
    deadline_s = time.monotonic() + READY_S
    while len(set(new_pictures(outputs, before))) < num_jobs and time.monotonic() < deadline_s:
        time.sleep(0.2)
    time.sleep(1)
    seeds = new_pictures(outputs, before)
    row = (
        f"The front was killed with {num_jobs} jobs, {saved_before} of them saved: after its next start "
        f"{len(set(seeds))} of {num_jobs} have their picture, {len(seeds) - len(set(seeds))} have a second one."
    )
    return Stop(row=row, is_good=sorted(set(seeds)) == list(range(9000, 9000 + num_jobs)), server=server)


def new_pictures(outputs: Path, before: set[str]) -> list[int]:
    """The seeds of pictures saved since then, one per file."""
    found = (re.search(r"-(9\d{3})\b", path.name) for path in outputs.rglob("*.png") if path.name not in before)
    return [int(match[1]) for match in found if match]


def try_head(server: FullServer, found: Machines, folder: Path) -> Stop:
    """SIGKILL to the head's control process."""
    head = next(iter(found.cluster.head_node.all_processes["gcs_server"]))
    os.kill(head.process.pid, signal.SIGKILL)
    began_s = time.monotonic()
    answers = Counter[str]()
    while server.process.poll() is None and time.monotonic() - began_s < 100:
        try:
            server.txt2img(seed=1, steps=2, width=SIDE_PX, height=SIDE_PX)
            answers["made"] += 1
        except OSError as error:
            answers[f"{type(error).__name__} {getattr(error, 'code', '')}".strip()] += 1
        time.sleep(2)
    code = server.process.poll()
    seconds = time.monotonic() - began_s
    ending = "still ran" if code is None else f"had ended with code {code}"
    if code is None:
        server.kill()
    return Stop(row=f"The head was killed: {seconds:.0f} s later the front {ending}; jobs meanwhile: {dict(answers)}.", is_good=True, server=server)


def run_speed(rounds: int) -> list[str]:
    """Rows of the report: throughput, one request of eight pictures, and the front's own time per job."""
    job = {"steps": 20, "width": 128, "height": 128, "override_settings": NO_GRID}
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with machines(folder / "worker", 2) as found, front(found.cluster.address, folder) as server:
            wait_for_workers(server, 2)
            machine = workers_of(server)[0]["worker"]
            for _ in range(rounds):
                for label, drained in (("two workers", False), ("one worker", True)):
                    server.post("/sdapi/v1/cluster/drain", {"worker": machine, "draining": drained})
                    warm(server, job)
                    times.setdefault(f"8 jobs, {label}", []).append(time_jobs(server, job))
                    times.setdefault(f"1 job of 8 pictures, {label}", []).append(time_one(server, {**job, "n_iter": 8}))
                server.post("/sdapi/v1/cluster/drain", {"worker": machine, "draining": False})
            overhead_ms = measure_overhead(server)
    rows = ["| what | median s | all |", "|---|---|---|"]
    rows += [f"| {label} | {statistics.median(found):.2f} | {', '.join(f'{one:.2f}' for one in found)} |" for label, found in times.items()]
    for kind in ("8 jobs", "1 job of 8 pictures"):
        one, two = (statistics.median(times[f"{kind}, {label}"]) for label in ("one worker", "two workers"))
        rows += ["", f"{kind}: two workers are {one / two:.2f} times as fast as one."]
    return [*rows, "", overhead_ms]


def warm(server: FullServer, job: dict[str, Any]) -> None:
    """The model is loaded on every worker that gets jobs."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: server.txt2img(**{**job, "seed": number, "steps": 2}), range(4)))


def time_jobs(server: FullServer, job: dict[str, Any]) -> float:
    began_s = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: server.txt2img(**{**job, "seed": number}), range(8)))
    return time.perf_counter() - began_s


def time_one(server: FullServer, job: dict[str, Any]) -> float:
    began_s = time.perf_counter()
    server.txt2img(**job)
    return time.perf_counter() - began_s


def measure_overhead(server: FullServer) -> str:
    """What a job takes beyond its worker's own time: the answer's time less what the worker reports for the picture."""
    found = []
    for seed in range(30):
        busy_before_s = sum(worker["busy_s"] for worker in workers_of(server))
        began_s = time.perf_counter()
        server.txt2img(seed=seed, steps=2, width=SIDE_PX, height=SIDE_PX)
        whole_s = time.perf_counter() - began_s
        busy_s = sum(worker["busy_s"] for worker in workers_of(server)) - busy_before_s
        found.append((whole_s - busy_s) * 1000)
    return (
        f"Time of the front, HTTP and Ray per job (30 jobs one after another): median {statistics.median(found):.1f} ms, largest {max(found):.1f} ms."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.campaign.cluster", description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("what", choices=("faults", "stops", "speed"))
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--every", type=float, default=6.0, metavar="S", help="seconds between two troubles")
    parser.add_argument("--rounds", type=int, default=3)
    ns = parser.parse_args(argv)
    command = f"python -m tools.campaign.cluster {ns.what}"
    if ns.what == "faults":
        rows, is_good = run_faults(ns.jobs, ns.clients, ns.every)
        title, command = (
            "cluster: jobs while workers die and machines come and go",
            f"{command} --jobs {ns.jobs} --clients {ns.clients} --every {ns.every:g}",
        )
    elif ns.what == "stops":
        rows, is_good = run_stops()
        title = "cluster: a worker that hangs, a front and a head that are killed"
    else:
        rows, is_good = run_speed(ns.rounds), True
        title, command = "cluster: two workers of one core against one", f"{command} --rounds {ns.rounds}"
    print("\n".join(rows))
    report(f"cluster_{ns.what}", title, command, rows)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
