"""Runs ControlNet passes as separate tasks on their slots, and sends the residuals to the slots that add them.

Knows no plan and no sampler. A row batch says which rows; its replica says where each ControlNet runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future

import torch
from torch import Tensor

from backend.nn.deferred_control import ControlTask, DeferredControl, add_residual
from backend.nn.program import Addition, ControlLists
from backend.parallel.exchange.copies import Copiers
from backend.parallel.exchange.transport import Transfer
from backend.parallel.placing.fleet import Fleet
from backend.parallel.running.failures import Cancelled, as_failure
from backend.parallel.running.residuals import ControlPlace, ResidualChain, Transfers
from backend.parallel.running.row_batch import RowBatch
from backend.parallel.running.stopwatch import Stopwatch


class ControlPasses:
    """Starts the passes for deferred residuals of row batches, and sends the residuals that already exist."""

    def __init__(self, fleet: Fleet, copiers: Copiers, is_cancelled: Callable[[], bool]) -> None:
        self._fleet, self._copiers, self._is_cancelled = fleet, copiers, is_cancelled

    def start(self, batch: RowBatch) -> None:
        """Submit ControlNet passes to their slots, and send residuals that already exist. Runs once per batch."""
        deferred = batch.call.control
        if batch.control is None and isinstance(deferred, DeferredControl):
            kinds = pending_kinds(deferred)
            links = [self._start_link(batch, part, kinds) for part in deferred.parts]
            batch.control = ResidualChain(links, kinds)

    def send_ready(self, batch: RowBatch) -> dict[Addition, Tensor]:
        """Send the residuals that exist from the start to the slots that add them. In a deferred chain: those of lists that no pass fills."""
        program, control = batch.route.replica.program, batch.call.control
        ready: dict[Addition, Tensor] = {}
        if isinstance(control, DeferredControl):
            kinds = pending_kinds(control)
            for part in control.parts:
                if isinstance(part, Mapping):
                    for addition, residual in program.name_residuals(without_kinds(part, kinds)).items():
                        ready[addition] = add_residual(residual, ready[addition]) if addition in ready else residual
        else:
            ready = program.name_residuals(control)
        return {addition: self._fleet.transport.send(residual, self._target(batch, addition)) for addition, residual in ready.items()}

    def _target(self, batch: RowBatch, addition: Addition) -> torch.device:
        return batch.route.devices[batch.route.addition_slots[addition]]

    def _start_link(self, batch: RowBatch, part: ControlLists | ControlTask, kinds: frozenset[str]) -> tuple[int, Future[Transfers]]:
        slot, future = batch.route.stages[0].slot, Future[Transfers]()
        try:
            if isinstance(part, Mapping):
                future.set_result(self._ship(batch, {kind: residuals for kind, residuals in part.items() if kind in kinds}))
                return slot, future
            place = batch.route.replica.controls[part.network]
            slot = place.slot
            task = part.on(self._fleet.device(slot), self._fleet.transport.send)
            return slot, self._fleet.worker(slot).submit(lambda: self._run(batch, task, place), priority=(batch.run.number,))
        except RuntimeError as error:  # out of memory there, or the slot is lost: the rows find out when they need the residuals
            future.set_exception(as_failure(slot, error))
            return slot, future

    def _run(self, batch: RowBatch, task: ControlTask, place: ControlPlace) -> Transfers:
        """On a slot's worker: run a ControlNet pass and send its residuals to the slots that add them."""
        if batch.run.has_failed or self._is_cancelled():
            raise Cancelled
        try:
            device, num_rows = self._fleet.device(place.slot), batch.call.num_rows
            watch = Stopwatch(device)
            residuals = task.run(place.network)
            ended = watch.stop(lambda ms: self._fleet.speeds.record(place.slot, place.work, place.work_per_row * num_rows, ms))
            batch.note_control(place.slot, device, watch.started, ended)
            return self._ship(batch, residuals)
        except BaseException:
            batch.run.has_failed = True
            raise

    def _ship(self, batch: RowBatch, residuals: ControlLists) -> Transfers:
        """Start sending the residuals to the slots that add them, in order of use. One that a slot adds in several places is sent once."""
        named = batch.route.replica.program.name_residuals(residuals)
        sent: dict[tuple[int, int], Transfer] = {}
        for addition, residual in named.items():
            key = (id(residual), batch.route.addition_slots[addition])
            if key not in sent:
                sent[key] = self._copiers.ship(residual, key[1])
        return {addition: sent[id(residual), batch.route.addition_slots[addition]] for addition, residual in named.items()}


def pending_kinds(deferred: DeferredControl) -> frozenset[str]:
    """Lists that a pass has yet to fill."""
    return frozenset(kind for part in deferred.parts if not isinstance(part, Mapping) for kind in part.kinds)


def without_kinds(control: ControlLists, kinds: frozenset[str]) -> ControlLists:
    return {kind: residuals for kind, residuals in control.items() if kind not in kinds}
