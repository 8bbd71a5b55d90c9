"""ControlNet residuals for rows in tiles. If every slot of the team has a copy of the ControlNet, each tile computes its own part before its first
segment. Otherwise the pass runs whole on one slot, and every tile gets its part of each residual.

Knows no plan and no sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from backend.nn.deferred_control import ControlTask, DeferredControl, add_residual
from backend.nn.network_call import NetworkCall
from backend.nn.program import Addition, ControlLists, Program
from backend.nn.tiles import Cut, Swaps, Tile
from backend.parallel.exchange.copies import Copiers
from backend.parallel.placing.fleet import Fleet
from backend.parallel.planning.plan import TileTeam
from backend.parallel.running.control_passes import pending_kinds, without_kinds
from backend.parallel.running.failures import Cancelled, as_failure
from backend.parallel.running.residuals import ControlPlace, ResidualChain, Transfers
from backend.parallel.running.routing import Replica
from backend.parallel.running.row_batch import Run
from backend.parallel.running.stopwatch import Stopwatch

Sent = TypeVar("Sent")
TiledTask = tuple[ControlTask, nn.Module]
"""A pass in tiles: its inputs, and the copy of the ControlNet, both on the tile's slot."""


@dataclass(slots=True, eq=False)
class TileResiduals:
    """What the tiles of some rows add: residuals that exist from the start, those of passes in tiles, and chains of whole passes that still run. By
    rank."""

    _ready: Sequence[Mapping[Addition, Tensor]]
    _chains: Sequence[ResidualChain] = field(default_factory=tuple)
    _tiled: Sequence[Sequence[TiledTask]] = field(default_factory=tuple)
    tiled_work_per_row: float = 0.0
    """FLOPs of the passes in tiles, for a whole row."""

    def compute_own(self, rank: int, tile: Tile, program: Program) -> Swaps[dict[Addition, Tensor]]:
        """A tile's part of the residuals that need not be waited for. On its slot's worker."""
        total = dict(self._ready[rank])
        for task, network in self._tiled[rank] if self._tiled else ():
            found = yield from task.run_on_tile(network, tile)
            for addition, residual in program.name_residuals(found).items():
                total[addition] = add_residual(residual, total[addition]) if addition in total else residual
        return total

    def chain(self, rank: int) -> ResidualChain | None:
        return self._chains[rank] if self._chains else None

    def failures(self) -> list[tuple[int, BaseException]]:
        """Slot and error of each pass that failed. Waits for all."""
        return self._chains[0].failures() if self._chains else []


class TileControls:
    """Starts the passes for deferred residuals, and sends each tile its part."""

    def __init__(self, fleet: Fleet, copiers: Copiers, is_cancelled: Callable[[], bool]) -> None:
        self._fleet, self._copiers, self._is_cancelled = fleet, copiers, is_cancelled

    def start(self, call: NetworkCall, replicas: Sequence[Replica], team: TileTeam, run: Run) -> TileResiduals | None:
        """Send each tile the inputs of its ControlNets, submit whole passes to their slots, and send residuals that already exist. None without
        control. `replicas`: the team's copies of the network. Raises: SlotFailure; then no pass has been submitted."""
        control, cut, replica = call.control, Cut.of_rows(team.rows), replicas[0]
        if control is None:
            return None
        if not isinstance(control, DeferredControl):
            return TileResiduals(self._send_ready(replica.program, [control], team, cut))
        tasks = [part for part in control.parts if not isinstance(part, Mapping) and _runs_in_tiles(part, replicas, team)]
        tiled = [self._send_tasks(tasks, one, slot) for one, slot in zip(replicas, team.slots)]
        left = DeferredControl(tuple(part for part in control.parts if part not in tasks))
        kinds = pending_kinds(left)
        known = [without_kinds(part, kinds) for part in left.parts if isinstance(part, Mapping)]
        ready = self._send_ready(replica.program, known, team, cut)
        links = [self._start_link(call, part, kinds, replica, team, cut, run) for part in left.parts] if kinds else []
        chains = [ResidualChain([(slot, futures[rank]) for slot, futures in links], kinds) for rank in range(len(team.slots))] if kinds else []
        return TileResiduals(ready, chains, tiled, sum(replica.controls[task.network].work_per_row for task in tasks))

    def _send_tasks(self, tasks: Sequence[ControlTask], replica: Replica, slot: int) -> list[TiledTask]:
        send, device = self._fleet.transport.send, self._fleet.device(slot)
        return [(_blaming_all(slot, partial(task.on, device, send)), replica.controls[task.network].network) for task in tasks]

    def _send_ready(self, program: Program, controls: Sequence[ControlLists], team: TileTeam, cut: Cut) -> list[dict[Addition, Tensor]]:
        total: dict[Addition, Tensor] = {}
        for control in controls:
            for addition, residual in program.name_residuals(control).items():
                total[addition] = add_residual(residual, total[addition]) if addition in total else residual
        send = self._fleet.transport.send
        return [
            {
                addition: _blaming_all(slot, partial(send, part, self._fleet.device(slot)))
                for addition, residual in total.items()
                if (part := program.residual_of_tile(residual, cut, rank)) is not None
            }
            for rank, slot in enumerate(team.slots)
        ]

    def _start_link(
        self, call: NetworkCall, part: ControlLists | ControlTask, kinds: frozenset[str], replica: Replica, team: TileTeam, cut: Cut, run: Run
    ) -> tuple[int, list[Future[Transfers]]]:
        """The slot that computes a link's residuals, and the future of each tile's part."""
        slot, futures = team.slots[0], [Future[Transfers]() for _ in team.slots]
        try:
            if isinstance(part, Mapping):
                late = {kind: residuals for kind, residuals in part.items() if kind in kinds}
                _distribute(futures, self._ship(replica.program, late, team, cut))
                return slot, futures
            place = replica.controls[part.network]
            slot = place.slot
            task = part.on(self._fleet.device(slot), self._fleet.transport.send)
            done = self._fleet.worker(slot).submit(self._run, call, task, place, replica.program, team, cut, run, priority=(run.number,))
            done.add_done_callback(lambda done: _pass_on(futures, done))
        except RuntimeError as error:  # out of memory there, or the slot is lost: the rows find out when they need the residuals
            for future in futures:
                future.set_exception(as_failure(slot, error))
        return slot, futures

    def _run(
        self, call: NetworkCall, task: ControlTask, place: ControlPlace, program: Program, team: TileTeam, cut: Cut, run: Run
    ) -> list[Transfers]:
        """On a slot's worker: run a ControlNet pass and send its residuals to the tiles."""
        if run.has_failed or self._is_cancelled():
            raise Cancelled
        try:
            watch = Stopwatch(self._fleet.device(place.slot))
            residuals = task.run(place.network)
            watch.stop(lambda ms: self._fleet.speeds.record(place.slot, place.work, place.work_per_row * call.num_rows, ms))
            return self._ship(program, residuals, team, cut)
        except BaseException:
            run.has_failed = True
            raise

    def _ship(self, program: Program, residuals: ControlLists, team: TileTeam, cut: Cut) -> list[Transfers]:
        """Start sending each tile its part, in order of use."""
        shipped: list[Transfers] = [{} for _ in team.slots]
        for addition, residual in program.name_residuals(residuals).items():
            for rank, slot in enumerate(team.slots):
                if (part := program.residual_of_tile(residual, cut, rank)) is not None:
                    shipped[rank][addition] = self._copiers.ship(part, slot)
        return shipped


def _blaming_all(slot: int, run: Callable[[], Sent]) -> Sent:
    """`run()`, a copy to a slot. Raises: SlotFailure of that slot if it is full or lost."""
    try:
        return run()
    except RuntimeError as error:
        raise as_failure(slot, error) from error


def _runs_in_tiles(task: ControlTask, replicas: Sequence[Replica], team: TileTeam) -> bool:
    """Whether every slot of the team has its own copy of the task's network, and tiles compute it."""
    places = [replica.controls.get(task.network) for replica in replicas]
    return len(team.slots) > 1 and task.has_tiles and all(place is not None and place.slot == slot for place, slot in zip(places, team.slots))


def _pass_on(futures: Sequence[Future[Transfers]], done: Future[list[Transfers]]) -> None:
    error = CancelledError() if done.cancelled() else done.exception()
    if error is None:
        _distribute(futures, done.result())
        return
    for future in futures:
        future.set_exception(error)


def _distribute(futures: Sequence[Future[Transfers]], parts: Sequence[Transfers]) -> None:
    for future, part in zip(futures, parts):
        future.set_result(part)
