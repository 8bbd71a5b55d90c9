"""Carries out a plan for calls of the network: rows go to replicas and through their stages, and results come back in order.

Each slot's worker runs the stages on its slot; rows that have finished a stage go to the next slot's worker. A tensor that a later stage reads
is sent as soon as it exists. Rows that need a residual that is still being computed leave their worker and return once it has arrived.
No worker ever waits for another worker, so there can be no deadlock.

Example: two rows (cond, uncond) through a UNet cut over slots 0 and 1, as `run` does it:

    slot 0: cond stage 0      uncond stage 0     (idle)
    slot 1: (idle)            cond stage 1       uncond stage 1
    `routing` decided that "skip 3" and "hidden" of stage 0 go to slot 1; `copies` transfers them while slot 0 works on uncond.

Parts: `routing` (which tensors go where), `copies` (how they travel), `control_passes` (ControlNets), `row_batch` (one batch and its record),
`failures`. Must not know guidance, samplers, memory policy, families of networks or how the plan was made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from backend import profiler
from backend.nn.network_call import NetworkCall
from backend.nn.program import HOOK_OPTIONS, Addition, ProgramState
from backend.parallel.exchange.copies import Copiers, LocalTensor, when_arrived
from backend.parallel.exchange.transport import Transfer
from backend.parallel.placing.fleet import Fleet
from backend.parallel.planning.plan import Piece, ReplicaPlan
from backend.parallel.running.control_passes import ControlPasses
from backend.parallel.running.failures import Cancelled as Cancelled
from backend.parallel.running.failures import SlotFailure as SlotFailure
from backend.parallel.running.failures import as_failure, worst_of
from backend.parallel.running.routing import Leaving, Route, make_route
from backend.parallel.running.routing import Replica as Replica
from backend.parallel.running.row_batch import RowBatch, Run
from backend.parallel.running.stopwatch import Stopwatch

DEAL_ALWAYS, DEAL_EVERY = 6, 8
"""Runs whose rows are dealt by the newest speeds: the first ones, and every so many after them. Dealing asks devices for their free memory."""
PieceTold = Callable[[int, Piece, float], None]
"""Slot, piece, ms per row."""

_TENSOR_OPTIONS = ("sigmas", "cond_mark")


class Executor:
    """Runs calls on the replicas of a plan. `run` may be called from several threads at once; their rows share the slots."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        fleet: Fleet,
        *,
        deal: Callable[[int], Sequence[int]],
        rows_per_batch: Callable[[ReplicaPlan, int], int] = lambda replica, share: 1,
        work: str = "",
        asynchronous: bool = True,
        is_cancelled: Callable[[], bool] = lambda: False,
        on_piece: PieceTold | None = None,
        measured_run: int = 1,
    ) -> None:
        """Args:
        replicas: copies of the network whose weights are in place.
        deal: how many of n rows each replica gets; `deal(3)` gives (2, 1).
        rows_per_batch: how many rows of a replica's share go through it at once.
        work: the key of measured speeds, which names the model and size.
        asynchronous: copies between slots overlap with computation. If False, each copy is waited for where it starts. The result is the same.
        is_cancelled: checked before every run of pieces that nothing leaves.
        on_piece: called with the ms per row of each finest piece in run number `measured_run` (the first run warms the machine up).
        """
        self._fleet = fleet
        self._routes = tuple(make_route(replica, fleet.device) for replica in replicas)
        self._shares_of, self._rows_per_batch = deal, rows_per_batch
        self._work = work
        self._is_cancelled = is_cancelled
        self._on_piece, self._measured_run = on_piece, measured_run
        self._numbers = count()
        self._dealt: dict[int, tuple[int, list[tuple[Route, int, int]]]] = {}
        self._copiers = Copiers(fleet, asynchronous=asynchronous)
        self._controls = ControlPasses(fleet, self._copiers, is_cancelled)

    @property
    def deferred_networks(self) -> frozenset[nn.Module]:
        """ControlNets that every replica has a slot for."""
        every = [frozenset(route.replica.controls) for route in self._routes]
        return frozenset.intersection(*every) if every else frozenset()

    def close(self) -> None:
        self._copiers.close()

    def run(self, call: NetworkCall) -> Tensor:
        """The network's output for all rows, on the call's device. Raises: Cancelled, SlotFailure."""
        recorder = profiler.recorder()
        run = Run(next(self._numbers), recorder.step)
        batches = [RowBatch(call.take_rows(first, end), route, run, recorder.next_batch()) for route, first, end in self._deal(call, run.number)]
        for batch in batches if call.control is not None else ():
            if len(batch.route.devices) == 1:  # other batches may wait for residuals from this batch's slot, so these passes go first
                self._controls.start(batch)
        for batch in batches:
            self._start(batch)
        return self._gather(batches, call.device)

    def _deal(self, call: NetworkCall, run_number: int) -> list[tuple[Route, int, int]]:
        """The rows for each route: dealt again in the first runs, while speeds are being measured, and from time to time later."""
        num_rows = call.num_rows
        dealt_at, dealt = self._dealt.get(num_rows, (-1, []))
        if dealt_at < 0 or run_number < DEAL_ALWAYS or run_number >= dealt_at + DEAL_EVERY:
            dealt = self._deal_rows(num_rows)
            self._dealt[num_rows] = run_number, dealt
        return dealt

    def _deal_rows(self, num_rows: int) -> list[tuple[Route, int, int]]:
        """Assign rows to routes in order, `rows_per_batch` at once."""
        dealt, first = [], 0
        for route, share in zip(self._routes, self._shares_of(num_rows)):
            step = max(1, self._rows_per_batch(route.replica.plan, share))
            dealt += [(route, start, min(start + step, first + share)) for start in range(first, first + share, step)]
            first += share
        return dealt

    def _gather(self, batches: Sequence[RowBatch], device: torch.device) -> Tensor:
        """Results in row order. All batches have ended when this returns or raises, so nothing keeps running after it."""
        failures = []
        for batch in batches:
            failure = batch.result.exception()
            if failure is not None:
                failures.append(failure)
        failures += [as_failure(slot, error) for batch in batches if batch.control is not None for slot, error in batch.control.failures()]
        if failures:
            raise worst_of(failures)
        outputs = [batch.take_output() for batch in batches]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    # the path of a batch

    def _start(self, batch: RowBatch) -> None:
        """Send the inputs to the first stage's device and the residuals to the slots that add them."""
        try:
            here = batch.here
            arriving = batch.call if here.device == batch.call.device else batch.call.on(here.device, self._fleet.transport.send)
            residuals: dict[Addition, Tensor] = {}
            if batch.call.control is not None:
                self._controls.start(batch)
                residuals = self._controls.send_ready(batch)
            self._submit(batch, partial(self._enter, batch, arriving, residuals))
        except RuntimeError as error:  # out of memory there, or the slot is lost
            batch.fail(batch.here.slot, error)

    def _submit(self, batch: RowBatch, task: Callable[[], None]) -> None:
        slot = batch.here.slot
        future = self._fleet.worker(slot).submit(task, priority=(batch.run.number,))
        future.add_done_callback(partial(batch.fail_if_unfinished, slot))

    def _submit_or_fail(self, batch: RowBatch, task: Callable[[], None]) -> None:
        try:
            self._submit(batch, task)
        except RuntimeError as error:
            batch.fail(batch.here.slot, error)

    def _enter(self, batch: RowBatch, call: NetworkCall, residuals: dict[Addition, Tensor]) -> None:
        """The first stage, on its slot's worker: make the state before the first segment, and send what other stages read of it.

        Args:
            batch: rows that go through one replica together; their record of where they are.
            call: their inputs, on the first stage's device.
            residuals: those of ControlNets that are there already, by the place that adds them.
        Returns: nothing; the state is in `batch.state`, and the stage's pieces have run.
        """
        program, route, recorder = batch.route.replica.program, batch.route, profiler.recorder()
        if recorder.is_on:
            with recorder.measure("stage", "time embedding", slot=batch.here.slot, device=batch.here.device, **batch.facts()):
                state = batch.state = program.start(call.rows, residuals=residuals, options=call.options)
        else:
            state = batch.state = program.start(call.rows, residuals=residuals, options=call.options)
        if len(route.stages) > 1:
            constants = [Leaving(name, tuple(route.devices), is_read_here=True) for name in program.constants]
            self._send(batch, [*constants, *route.start_leaves], state.tensors)
        self._run_stage(batch)

    def _resume(self, batch: RowBatch) -> None:
        """A later stage, on its slot's worker: receive the tensors that arrived, and run its pieces.

        Args:
            batch: its `here` is this stage, and `batch.transfers` holds every tensor that this stage reads.
        Returns: nothing; the tensors are in `batch.state`.
        """
        state, here = batch.state, batch.here
        assert state is not None
        state.tensors = {}
        for name, is_last in [*here.reads.items(), *((name, False) for name in batch.route.replica.program.constants)]:
            transfer = batch.transfers.pop((name, here.slot), None) if is_last else batch.transfers.get((name, here.slot))
            if transfer is not None:
                state.tensors[name] = transfer.receive()
        if any(state.options.get(name) for name in HOOK_OPTIONS):
            for name in _TENSOR_OPTIONS:
                if isinstance(state.options.get(name), Tensor):
                    state.options[name] = self._fleet.transport.send(state.options[name], here.device)
        self._run_stage(batch)

    def _run_stage(self, batch: RowBatch) -> None:
        """Run the rest of the stage's pieces. If a piece needs a residual that has not arrived, the batch leaves the worker before it.

        Args:
            batch: `batch.parts` are the pieces left, empty before the first.
        Returns: nothing; the batch has left for its next stage, or comes back here once the residual has arrived.
        Raises: Cancelled; SlotFailure if a ControlNet failed; what the device raised.
        """
        state, here = batch.state, batch.here
        assert state is not None
        watch = Stopwatch(here.device)
        if batch.control is None and not self._is_timed(batch):
            self._run_whole_stage(batch)
        else:
            batch.parts = batch.parts or self._parts_of(batch)
        while batch.parts:
            place, part = batch.parts[0]
            if not self._take_residuals(batch, part):
                ended = watch.stop(batch.add_time)
                batch.note_part(watch.started, ended)
                assert batch.control is not None
                batch.control.when_ready(lambda: self._submit_or_fail(batch, lambda: self._run_stage(batch)))
                return
            self._check_goes_on(batch)
            self._run_part(batch, part)
            del batch.parts[0]
            if batch.parts and batch.parts[0][0] != place:
                self._send(batch, here.leaves[place], state.tensors)
        ended = watch.stop(partial(self._record, batch, batch.stage))
        batch.note_stage(watch.started, ended)
        if here.leaves[-1]:
            self._send(batch, here.leaves[-1], state.tensors)
        self._leave(batch)

    def _run_whole_stage(self, batch: RowBatch) -> None:
        """Run a stage that waits for nothing, in as few turns as what it sends allows. Raises: Cancelled; what the device raised."""
        state = batch.state
        assert state is not None
        *runs, (last, _) = batch.route.stages[batch.stage].runs
        for pieces, leaving in runs:
            self._check_goes_on(batch)
            self._run_pieces(batch, pieces, state)
            self._send(batch, leaving, state.tensors)
        self._check_goes_on(batch)
        self._run_pieces(batch, last, state)

    def _run_pieces(self, batch: RowBatch, pieces: Sequence[Piece], state: ProgramState) -> None:
        """Run pieces; whole copies may replay recorded launches, stages of a cut copy never do."""
        program, recorder = batch.route.replica.program, self._fleet.recorder
        if recorder is None or len(batch.route.stages) > 1:
            program.run_pieces(pieces, state)
        else:
            recorder.run(program, pieces, state)

    def _check_goes_on(self, batch: RowBatch) -> None:
        if batch.run.has_failed or self._is_cancelled():
            raise Cancelled

    def _is_timed(self, batch: RowBatch) -> bool:
        """Whether this call is the one whose pieces are measured."""
        return self._on_piece is not None and batch.run.number == self._measured_run

    def _parts_of(self, batch: RowBatch) -> list[tuple[int, Piece]]:
        """The stage's pieces. One that adds a possibly late residual at its end is split into transformer blocks."""
        program, kinds = batch.route.replica.program, frozenset[str]() if batch.control is None else batch.control.kinds
        parts: list[tuple[int, Piece]] = []
        for place, piece in enumerate(batch.here.pieces):
            is_late = any(addition.at_end and addition.kind in kinds for addition in program.flow(piece).adds)
            parts += [(place, part) for part in (program.finest_parts(piece) if is_late else (piece,))]
        return parts

    def _take_residuals(self, batch: RowBatch, part: Piece) -> bool:
        """Put the residuals that a part adds into the state. False if a ControlNet is still computing them. Raises: SlotFailure if one failed."""
        if batch.control is None:
            return True
        additions = [one for one in batch.route.replica.program.flow(part).adds if one.kind in batch.control.kinds]
        if not additions:
            return True
        if not batch.control.is_ready:
            return False
        for slot, error in batch.control.failures():
            raise as_failure(slot, error)
        assert batch.state is not None
        for addition in additions:
            if (residual := batch.control.take(addition)) is not None:
                batch.state.residuals[addition] = residual
        return True

    def _run_part(self, batch: RowBatch, part: Piece) -> None:
        """Run one part; while pieces are being measured, block by block and timed."""
        program, state, here = batch.route.replica.program, batch.state, batch.here
        assert state is not None
        if self._on_piece is None or not self._is_timed(batch):
            program.run_piece(part, state)
            return
        for finest in program.finest_parts(part):
            watch = Stopwatch(here.device)
            program.run_piece(finest, state)
            watch.stop(partial(_tell_piece, self._on_piece, here.slot, finest, batch.call.num_rows))

    def _send(self, batch: RowBatch, leaving: Sequence[Leaving], tensors: dict[str, Tensor]) -> None:
        """Send tensors that other stages read, at once. The same tensor under two names goes to a slot once."""
        sent: dict[tuple[int, int], Transfer] = {}
        for one in leaving:
            tensor = tensors.get(one.name)
            if tensor is None:
                continue
            for slot in one.slots:
                key = (id(tensor), slot)
                if key not in sent:
                    sent[key] = LocalTensor(tensor) if slot == batch.here.slot else self._copiers.ship(tensor, slot)
                batch.transfers[one.name, slot] = sent[key]
        for one in leaving:
            if not one.is_read_here:
                tensors.pop(one.name, None)

    def _leave(self, batch: RowBatch) -> None:
        """Go to the next stage once everything it reads has arrived.

        Args:
            batch: done with its stage.
        Returns: nothing; after the last stage `batch.result` is the network's output, on its way to the call's device.
        """
        state = batch.state
        assert state is not None
        if batch.stage + 1 == len(batch.route.stages):
            output = state.tensors[batch.route.replica.program.output]
            batch.state, batch.transfers = None, {}
            batch.finish(self._fleet.transport.ship(output, batch.call.device))
            return
        left_slot = batch.here.slot
        state.tensors = {}
        batch.stage += 1
        awaited = [transfer for name in batch.here.reads if (transfer := batch.transfers.get((name, batch.here.slot))) is not None]
        when_arrived(awaited, lambda failure: self._go_on(batch, left_slot, failure))

    def _go_on(self, batch: RowBatch, left_slot: int, failure: BaseException | None) -> None:
        if failure is not None:
            batch.fail(left_slot, failure)
        else:
            self._submit_or_fail(batch, lambda: self._resume(batch))

    def _record(self, batch: RowBatch, stage: int, busy_ms: float) -> None:
        done = batch.call.num_rows * batch.route.work_of_stage(stage)
        self._fleet.speeds.record(batch.route.stages[stage].slot, self._work, done, busy_ms + batch.busy_ms)
        batch.busy_ms = 0.0


def _tell_piece(tell: PieceTold, slot: int, piece: Piece, num_rows: int, busy_ms: float) -> None:
    tell(slot, piece, busy_ms / num_rows)
