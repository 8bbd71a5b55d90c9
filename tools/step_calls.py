"""Counts the Python calls that a denoising step makes outside of the network's layers: the machinery that launches of all slots share.

A step's calls are those of a long run less those of a short one, divided by the steps between them, so that what is done once per run does not
count. Threads are told apart by name. A call of a layer, with all inside of it, belongs to the network. Resuming a generator is a call.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from torch import nn

from backend.nn.owner import owner_of
from backend.nn.program import Program
from backend.parallel.placing.fleet import Fleet
from backend.parallel.placing.replica_modules import ReplicaModules
from backend.parallel.running.worker import SlotWorker
from backend.patcher.unet import UnetPatcher

_LAYER_CALL: CodeType = nn.Module.__call__.__code__


@dataclass(slots=True)
class StepCalls:
    """Calls per step, by thread, and the functions called most. `cpu_ms`: processor time per step of the whole process, layers included."""

    by_thread: dict[str, float]
    by_function: dict[str, float]
    cpu_ms: float

    @property
    def total(self) -> float:
        return sum(self.by_thread.values())


@dataclass(eq=False)
class _Counter:
    """Counts in every thread that `watch` was called in."""

    layers: frozenset[int]
    by_thread: Counter[str] = field(default_factory=Counter)
    by_function: Counter[str] = field(default_factory=Counter)
    _inside: dict[int, FrameType] = field(default_factory=dict)

    def watch(self) -> None:
        sys.setprofile(self.see)

    def see(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" and event != "return":
            return
        thread = threading.get_ident()
        layer_frame = self._inside.get(thread)
        if event == "return":
            if frame is layer_frame:
                del self._inside[thread]
        elif layer_frame is None:
            if frame.f_code is _LAYER_CALL and id(frame.f_locals["self"]) in self.layers:
                self._inside[thread] = frame
                return
            self.by_thread[threading.current_thread().name] += 1
            name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # since Python 3.11
            self.by_function[f"{frame.f_globals.get('__name__', '')}.{name}"] += 1


def programs_of(unet: UnetPatcher) -> list[Program]:
    """The network's program and those of its copies on other slots."""
    copies = owner_of(unet.model).find(ReplicaModules)
    networks: list[Any] = [unet.model, *(() if copies is None else (patcher.model for patcher in copies.values()))]
    return [network.program for network in networks]


def _layers_of(programs: Iterable[Program]) -> frozenset[int]:
    """The layers that these programs call, and those of their embeddings, by id."""
    parts = [part for program in programs for part in (*program.segments, program.embedding)]
    return frozenset(id(module) for part in parts for _, layer in part.named_layers for module in layer.modules())


@contextmanager
def _counting(layers: frozenset[int], workers: Sequence[SlotWorker]) -> Iterator[_Counter]:
    """Counts in this thread, in these workers' and in threads that start meanwhile."""
    counter = _Counter(layers)
    for worker in workers:
        worker.submit(counter.watch).result()
    threading.setprofile(counter.see)
    counter.watch()
    try:
        yield counter
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        for worker in workers:
            worker.submit(sys.setprofile, None).result()


def count_step_calls(run: Callable[[int], Any], programs: Sequence[Program], fleet: Fleet, *, short: int = 5, long: int = 9) -> StepCalls:
    """Calls per step of `run(number of steps)` on this fleet. It must have run before, so that nothing is done for the first time."""
    layers, workers = _layers_of(programs), []
    if len(fleet.working_slots) > 1:
        workers = [fleet.worker(slot.index) for slot in fleet.working_slots]
    counted, cpu_s = [], []
    for num_steps in (short, long):
        with _counting(layers, workers) as counter:
            run(num_steps)
        counted.append(counter)
    for num_steps in (short, long):
        began_s = time.process_time()
        run(num_steps)
        cpu_s.append(time.process_time() - began_s)
    return StepCalls(
        by_thread=_per_step(counted[0].by_thread, counted[1].by_thread, long - short),
        by_function=_per_step(counted[0].by_function, counted[1].by_function, long - short),
        cpu_ms=1000.0 * (cpu_s[1] - cpu_s[0]) / (long - short),
    )


def _per_step(few: Counter[str], many: Counter[str], num_steps: int) -> dict[str, float]:
    """What the longer run counted more, per step, the most first."""
    more = {name: (many[name] - few[name]) / num_steps for name in many}
    return {name: calls for name, calls in sorted(more.items(), key=lambda item: -item[1]) if calls}
