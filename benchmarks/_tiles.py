"""Passes of one network, one row each, on one CPU slot and in tiles on two: one core per slot, fp32, random weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backend.nn.network_call import NetworkCall
from backend.nn.program import Program
from backend.nn.tiles import divide_into_tiles
from backend.parallel.placing.fleet import Fleet, current_fleet
from backend.parallel.planning.plan import ReplicaPlan, TileTeam
from backend.parallel.running.routing import Replica
from backend.parallel.running.tile_executor import TileExecutor
from benchmarks._multi_slot import TWO_SLOTS, use_slots
from tools.measure import Bench, Metrics, Variant

SLOW_SPEED = 0.6


class _SlowWorker:
    """A worker that is busy 1 / SLOW_SPEED times as long with all it does."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def submit(self, function: Callable[..., Any], *args: Any, priority: tuple[float, ...] = ()) -> Future[Any]:
        def run() -> Any:
            began_s = time.perf_counter()
            result = function(*args)
            time.sleep((time.perf_counter() - began_s) * (1.0 / SLOW_SPEED - 1.0))
            return result

        return self._worker.submit(run, priority=priority)


class _SlowFleet:
    """The fleet with its second slot slowed."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fleet, name)

    def worker(self, index: int) -> Any:
        worker = self._fleet.worker(index)
        return _SlowWorker(worker) if index == 1 else worker


def _executor(program: Program, fleet: Any, length: int, unit: int, speeds: tuple[float, float]) -> TileExecutor:
    pieces = program.whole_pieces()
    replicas = [Replica(program=program, plan=ReplicaPlan(pieces=pieces, slots=(slot,) * len(pieces))) for slot in (0, 1)]
    team = TileTeam(slots=(0, 1), rows=divide_into_tiles(length, speeds, unit))
    return TileExecutor(replicas, [team], fleet, deal=lambda num_rows: (num_rows,))


@torch.no_grad()
def _alone(program: Program, call: NetworkCall) -> Tensor:
    return program.run(call.start(program))


def _compare(run: Callable[[NetworkCall], Tensor], call: NetworkCall, expected: Tensor) -> Metrics:
    output = run(call)
    difference = float((output - expected).abs().max() / expected.std())
    if difference > 1e-4:
        raise AssertionError(f"tiles and the whole differ by {difference:.2g} of the output's spread; 1e-4 is rounding.")
    return {"largest difference / std": difference}


def make_variants(make: Callable[[], tuple[Program, NetworkCall]], *, slowed: bool) -> Mapping[str, Variant]:
    use_slots(TWO_SLOTS)
    torch.manual_seed(0)
    program, call = make()
    traffic, fleet = program.tile_traffic(call.rows), current_fleet()
    ways: dict[str, Callable[[NetworkCall], Tensor]] = {
        "one slot": partial(_alone, program),
        "two slots": _executor(program, fleet, traffic.length, traffic.unit, (1.0, 1.0)).run,
    }
    if slowed:
        ways[f"two slots, one of speed {SLOW_SPEED}"] = _executor(program, _SlowFleet(fleet), traffic.length, traffic.unit, (1.0, SLOW_SPEED)).run
    expected = _alone(program, call)
    return {name: partial(_compare, way, call, expected) for name, way in ways.items()}


def make_tile_bench(
    what: str,
    make: Callable[[], tuple[Program, NetworkCall]],
    *,
    at_least: str,
    num_rounds: int,
    slowed: bool = False,
    packages: tuple[str, ...] = (),
) -> Bench:
    return Bench(
        question=(
            f"How much faster do two CPU slots of one core each compute one row together than one slot does? {what}, one pass of the network, fp32, "
            f"random weights. Asked for: {at_least}."
        ),
        make_variants=partial(make_variants, make, slowed=slowed),
        baseline="one slot",
        num_rounds=num_rounds,
        work_per_call=1,
        work_unit="passes",
        packages=("torch", "diffusers", *packages),
    )
