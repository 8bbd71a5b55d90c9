"""ControlNet residuals for rows in tiles: each pass runs whole, on one slot, and every tile gets its part of each residual.

Knows no plan and no sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

from torch import Tensor

from backend.nn.deferred_control import ControlTask, DeferredControl, add_residual
from backend.nn.network_call import NetworkCall
from backend.nn.program import Addition, ControlLists, Program
from backend.nn.tiles import Cut
from backend.parallel.exchange.copies import Copiers
from backend.parallel.placing.fleet import Fleet
from backend.parallel.planning.plan import TileTeam
from backend.parallel.running.control_passes import pending_kinds, without_kinds
from backend.parallel.running.failures import Cancelled, as_failure
from backend.parallel.running.residuals import ControlPlace, ResidualChain, Transfers
from backend.parallel.running.routing import Replica
from backend.parallel.running.row_batch import Run
from backend.parallel.running.stopwatch import Stopwatch


@dataclass(slots=True, eq=False)
class TileResiduals:
    """What the tiles of some rows add: residuals that exist from the start, and chains of passes that still run. By rank."""

    _ready: Sequence[Mapping[Addition, Tensor]]
    _chains: Sequence[ResidualChain] = field(default_factory=tuple)

    def ready(self, rank: int) -> Mapping[Addition, Tensor]:
        return self._ready[rank]

    def chain(self, rank: int) -> ResidualChain | None:
        return self._chains[rank] if self._chains else None

    def failures(self) -> list[tuple[int, BaseException]]:
        """Slot and error of each pass that failed. Waits for all."""
        return self._chains[0].failures() if self._chains else []


class TileControls:
    """Starts the passes for deferred residuals, and sends each tile its part."""

    def __init__(self, fleet: Fleet, copiers: Copiers, is_cancelled: Callable[[], bool]) -> None:
        self._fleet, self._copiers, self._is_cancelled = fleet, copiers, is_cancelled

    def start(self, call: NetworkCall, replica: Replica, team: TileTeam, run: Run) -> TileResiduals | None:
        """Submit ControlNet passes to the slots of `replica.controls`, and send residuals that already exist. None without control."""
        control, cut = call.control, Cut.of_rows(team.rows)
        if control is None:
            return None
        if not isinstance(control, DeferredControl):
            return TileResiduals(self._send_ready(replica.program, [control], team, cut))
        kinds = pending_kinds(control)
        known = [without_kinds(part, kinds) for part in control.parts if isinstance(part, Mapping)]
        links = [self._start_link(call, part, kinds, replica, team, cut, run) for part in control.parts]
        chains = [ResidualChain([(slot, futures[rank]) for slot, futures in links], kinds) for rank in range(len(team.slots))]
        return TileResiduals(self._send_ready(replica.program, known, team, cut), chains)

    def _send_ready(self, program: Program, controls: Sequence[ControlLists], team: TileTeam, cut: Cut) -> list[dict[Addition, Tensor]]:
        total: dict[Addition, Tensor] = {}
        for control in controls:
            for addition, residual in program.name_residuals(control).items():
                total[addition] = add_residual(residual, total[addition]) if addition in total else residual
        send = self._fleet.transport.send
        return [
            {
                addition: send(part, self._fleet.device(slot))
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
