"""Fleets for tests: one whose workers do what the test says, and one whose workers are real engines in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from modules.application import Application, build_application
from modules.cluster.engine import WorkerEngine
from modules.cluster.files import FileCache
from modules.cluster.fleet import WorkerLostError
from modules.cluster.orders import Order, unpack_order
from modules.cluster.values import pack
from modules.launch.cmd_args import config_for_tests

VERSIONS = {"protocol": "1"}


def report_of(name: str, **changes: Any) -> dict[str, Any]:
    """What a worker with one slot says about itself."""
    slot = {"device": "cpu", "name": "CPU", "total_bytes": 8 << 30, "free_bytes": 4 << 30}
    return {"worker": name, "machine": f"machine-{name}", "address": "", "versions": VERSIONS, "slots": [slot], "networks": [], **changes}


def outcome_of(order: Order, *, run_s: float = 0.1) -> bytes:
    """A picture per seed, whose color is the seed."""
    seeds = order.fields["seed"]
    pictures = [Image.new("RGB", (8, 8), (seed % 256, 1, 2)) for seed in seeds]
    parts = {"pictures": pictures, "infotexts": [f"Seed: {seed}" for seed in seeds], "extra_pictures": [], "comments": [], "facts": {}}
    return pack({**parts, "run_s": run_s, "load_s": 0.0})


@dataclass
class ScriptedFleet:
    """Workers by name; `behave(worker, order, number of this follow)` gives the answer to follow, or raises."""

    workers: dict[str, dict[str, Any]]
    behave: Callable[[str, Order, int], Mapping[str, Any]] = lambda worker, order, number: {"outcome": outcome_of(order)}
    on_start: Callable[[str, Order], Mapping[str, Any]] = lambda worker, order: {}
    started: list[tuple[str, Order]] = field(default_factory=list)
    controls: list[tuple[str, str]] = field(default_factory=list)
    parts: list[tuple[str, int, bytes]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    is_closed: bool = False

    def __post_init__(self) -> None:
        self._orders: dict[tuple[str, str], Order] = {}
        self._follows: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def reports(self) -> Sequence[Any]:
        return list(self.workers.values())

    def start(self, worker: str, order_id: str, message: bytes) -> Mapping[str, Any]:
        self._check(worker)
        order = unpack_order(message)
        answer = self.on_start(worker, order)
        if not answer:
            with self._lock:
                self.started.append((worker, order))
                self._orders[worker, order_id] = order
        return answer

    def follow(self, worker: str, order_id: str, known_preview: int) -> Mapping[str, Any]:
        self._check(worker)
        with self._lock:
            number = self._follows[worker, order_id] = self._follows.get((worker, order_id), 0) + 1
        return self.behave(worker, self._orders[worker, order_id], number)

    def control(self, worker: str, order_id: str, action: str) -> None:
        self._check(worker)
        if action != "forget":
            self.controls.append((worker, action))

    def send_part(self, worker: str, file: Mapping[str, Any], offset: int, data: bytes) -> Mapping[str, Any]:
        self._check(worker)
        self.parts.append((worker, offset, data))
        return {"have_bytes": offset + len(data), "is_whole": offset + len(data) == file["size_bytes"]}

    def num_places(self) -> int:
        return len(self.workers)

    def resize(self, num_workers: int) -> None:
        self.sizes.append(num_workers)

    def close(self) -> None:
        self.is_closed = True

    def _check(self, worker: str) -> None:
        if worker not in self.workers:
            raise WorkerLostError("the test took it away")


class EngineFleet:
    """Workers that are engines of this process with data folders of their own. They take turns: there is one torch."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.engines: dict[str, WorkerEngine] = {}
        self._loop = asyncio.SelectorEventLoop()  # not new_event_loop(): close() closes it
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        for name, folder in folders.items():
            cache = folder / "cache" / "cluster"
            config = config_for_tests(folder, ckpt_dirs=(folder / "models" / "Stable-diffusion", cache / "checkpoint"))
            app: Application = build_application(config)
            dirs = {"checkpoint": config.ckpt_dirs, "module": config.vae_dirs, "network": config.lora_dirs}
            facts = {"worker": name, "machine": f"machine-{name}", "address": "", "versions": VERSIONS}
            self.engines[name] = WorkerEngine(app, FileCache(cache, dirs, spare_bytes=0), facts=facts)

    def _engine(self, worker: str) -> WorkerEngine:
        if worker not in self.engines:
            raise WorkerLostError("the test took it away")
        return self.engines[worker]

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def reports(self) -> Sequence[Any]:
        return [engine.report() for engine in self.engines.values()]

    def start(self, worker: str, order_id: str, message: bytes) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self._wait(self._engine(worker).start(order_id, message))
        return answer

    def follow(self, worker: str, order_id: str, known_preview: int) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self._wait(self._engine(worker).follow(order_id, known_preview))
        return answer

    def control(self, worker: str, order_id: str, action: str) -> None:
        self._engine(worker).control(order_id, action)

    def send_part(self, worker: str, file: Mapping[str, Any], offset: int, data: bytes) -> Mapping[str, Any]:
        return self._engine(worker).send_part(file, offset, data)

    def num_places(self) -> int:
        return len(self.engines)

    def resize(self, num_workers: int) -> None:
        pass

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
