"""Carries out a plan for calls of the network: rows go to replicas, units go through stages, results come back in order.

Each slot's worker runs the stages of its slot; a unit that has finished a stage goes to the next slot's worker. A skip connection is sent
as soon as it exists to the slot that will use it. A ControlNet's pass is a task of its own on its slot: a unit that comes to the first segment
that adds residuals before they are there leaves its worker and comes back when they are. Nothing here waits inside a worker for another
worker, so nothing can block for good.
Must not know guidance, samplers, memory policy or how the plan was made.

Shapes: B rows, C channels, H W latent rows and columns, E width of the time embedding, L tokens, D width of a token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from backend import profiler
from backend.nn.deferred_control import ControlTask, DeferredControl, add_residuals
from backend.nn.network_call import Control, NetworkCall
from backend.nn.unet_program import Program
from backend.nn.unet_state import UNetState
from backend.parallel.fleet import Fleet
from backend.parallel.plan import Piece, ReplicaPlan, Stage
from backend.parallel.stopwatch import Stopwatch
from backend.parallel.transport import Parcel
from backend.parallel.unit_control import ControlPlace, Parcels, UnitControl, receive_next
from backend.profiler import Mark

Result = TypeVar("Result")
PieceTold = Callable[[int, Piece, float], None]
"""Slot, piece, ms per row."""

_HOOK_OPTIONS = ("patches", "patches_replace", "block_modifiers", "block_inner_modifiers", "group_norm_wrapper", "groupnorm_wrapper")
_TENSOR_OPTIONS = ("sigmas", "cond_mark")


class Cancelled(Exception):
    """The run was called off between two pieces of a unit."""


class SlotFailure(RuntimeError):
    """A unit failed on a slot. `cause` is what the work raised there, without its frames, which would keep tensors alive."""

    def __init__(self, slot: int, cause: BaseException) -> None:
        self.slot, self.cause = slot, cause.with_traceback(None)
        super().__init__(f"slot {slot}: {type(cause).__name__}: {cause}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """One copy of the network in place: its program, whose weights are where `plan` says. `controls`: where ControlNets run for it, by their own
    network."""

    program: Program
    plan: ReplicaPlan
    work_per_row: Mapping[Piece, float] = field(default_factory=dict)
    controls: Mapping[nn.Module, ControlPlace] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Route:
    """The way of a unit through one replica: its stages, the devices of their slots, and the slots that use each skip and ControlNet residual."""

    replica: Replica
    stages: tuple[Stage, ...]
    devices: Mapping[int, torch.device]
    skip_targets: Mapping[int, int]
    control_targets: Mapping[str, tuple[int, ...]]

    def device(self, stage: int) -> torch.device:
        return self.devices[self.stages[stage].slot]


def _make_route(replica: Replica, fleet: Fleet) -> _Route:
    segments, plan = replica.program.segments, replica.plan
    first_part = {piece.segment: slot for piece, slot in zip(plan.pieces, plan.slots) if piece.first_block == 0}
    last_part = {piece.segment: slot for piece, slot in zip(plan.pieces, plan.slots) if piece.end_block is None}
    inputs = [index for index, segment in enumerate(segments) if segment.kind == "input"]
    outputs = [index for index, segment in enumerate(segments) if segment.kind == "output"]
    middles = [index for index, segment in enumerate(segments) if segment.kind == "middle"]
    return _Route(
        replica,
        plan.stages,
        {slot: fleet.device(slot) for slot in plan.used_slots},
        {source: first_part[target] for source, target in zip(reversed(inputs), outputs)},
        {
            "input": tuple(last_part[index] for index in inputs),
            "middle": tuple(last_part[index] for index in middles),
            "output": tuple(first_part[index] for index in outputs),
        },
    )


@dataclass(frozen=True, slots=True)
class _OnItsWay:
    """A skip connection that was sent to another slot. Has its shape, which an upsampler may ask for."""

    shape: torch.Size
    parcel: Parcel


@dataclass(slots=True)
class _Run:
    """What the units of one call share: their place in the queue, and whether one of them has failed, which makes the others vain."""

    number: int
    step: int = -1
    has_failed: bool = False


@dataclass(slots=True, eq=False)
class _Unit:
    """Rows of a call on their way through a route."""

    call: NetworkCall
    route: _Route
    run: _Run
    result: Future[Parcel] = field(default_factory=Future)
    stage: int = 0
    pieces: list[Piece] = field(default_factory=list)
    """What is left of the running stage."""
    busy_ms: float = 0.0
    """Time that the running stage took before the unit waited for residuals."""
    state: UNetState | None = None
    control: UnitControl | None = None
    hidden: Parcel | None = None
    transformer_input: Parcel | None = None
    sent_skip: tuple[Tensor, int, Parcel] | None = None
    """The last skip that left the running stage: what, where to, and on its way."""
    profile_number: int = -1
    shared: dict[int, tuple[Parcel, Parcel | None]] = field(default_factory=dict)
    """Time embedding and context, per slot."""


class Executor:
    """Runs calls over the replicas of a plan. `run` may be called from many threads at once: their units share the slots."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        fleet: Fleet,
        *,
        deal: Callable[[int], Sequence[int]],
        rows_per_unit: Callable[[ReplicaPlan, int], int] = lambda replica, share: 1,
        work: str = "",
        asynchronous: bool = True,
        is_cancelled: Callable[[], bool] = lambda: False,
        on_piece: PieceTold | None = None,
        measured_run: int = 1,
    ) -> None:
        """`deal` says how many of n rows each replica gets, `rows_per_unit` how many of its share go through it at once. `work` names the model
        and size that measured speeds are kept for.

        `on_piece` is told the ms per row of each piece at its finest in one run, number `measured_run` (the first warms the machine up).
        `asynchronous`: copies between slots run beside computation; without it each is awaited where it starts. The result is the same.
        """
        self._fleet = fleet
        self._routes = tuple(_make_route(replica, fleet) for replica in replicas)
        self._deal, self._rows_per_unit = deal, rows_per_unit
        self._work = work
        self._asynchronous = asynchronous
        self._is_cancelled = is_cancelled
        self._on_piece, self._measured_run = on_piece, measured_run
        self._numbers = count()
        self._copiers = _Copiers()

    def close(self) -> None:
        self._copiers.close()

    def run(self, call: NetworkCall) -> Tensor:
        """The network's output for all rows, on the call's device. Raises: Cancelled, SlotFailure."""
        recorder = profiler.recorder()
        run = _Run(next(self._numbers), recorder.step)
        units = [
            _Unit(call.rows(first, end), route, run, profile_number=recorder.next_unit()) for route, first, end in self._deal_rows(call.num_rows)
        ]
        for unit in units:
            if len(unit.route.devices) == 1:  # others may wait for what this unit's slot computes for them, so that comes first
                self._start_control(unit)
        for unit in units:
            self._start(unit)
        return self._gather(units, call.device)

    def _deal_rows(self, num_rows: int) -> list[tuple[_Route, int, int]]:
        """Rows to routes, in order, so many at once as `rows_per_unit` says."""
        dealt, first = [], 0
        for route, share in zip(self._routes, self._deal(num_rows)):
            step = max(1, self._rows_per_unit(route.replica.plan, share))
            dealt += [(route, start, min(start + step, first + share)) for start in range(first, first + share, step)]
            first += share
        return dealt

    def _gather(self, units: Sequence[_Unit], device: torch.device) -> Tensor:
        """Results in the order of rows. All units have ended when this returns or raises, so that nothing runs behind the caller's back."""
        failures = [failure for failure in (unit.result.exception() for unit in units) if failure is not None]
        failures += [_as_failure(slot, error) for unit in units if unit.control is not None for slot, error in unit.control.failures()]
        if failures:
            raise _worst(failures)
        outputs = [unit.result.result().receive() for unit in units]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    # a unit's way

    def _start(self, unit: _Unit) -> None:
        """Send the inputs to the first stage's device and the residuals to where they are added."""
        try:
            self._start_control(unit)
            target, send = unit.route.device(0), self._fleet.transport.send
            arriving = unit.call.on(target, send)
            control = self._send_control(unit)
            self._submit(unit, lambda: self._enter(unit, arriving, control))
        except RuntimeError as error:  # no room there, or the slot is lost
            _fail(unit, unit.route.stages[0].slot, error)

    def _start_control(self, unit: _Unit) -> None:
        """Give ControlNets' passes to their slots, and send what is there already. Once per unit."""
        deferred = unit.call.control
        if unit.control is None and isinstance(deferred, DeferredControl):
            unit.control = UnitControl([self._start_link(unit, part) for part in deferred.parts])

    def _start_link(self, unit: _Unit, part: Control | ControlTask) -> tuple[int, Future[Parcels]]:
        slot = unit.route.stages[0].slot
        try:
            if isinstance(part, Mapping):
                return slot, _done(self._ship_control(unit, part))
            place = unit.route.replica.controls[part.network]
            slot = place.slot
            task = part.on(self._fleet.device(slot), self._fleet.transport.send)
            return slot, self._fleet.worker(slot).submit(lambda: self._run_control(unit, task, place), priority=(unit.run.number,))
        except RuntimeError as error:  # no room there, or the slot is lost: the unit finds out when it needs the residuals
            failed: Future[Parcels] = Future()
            failed.set_exception(_as_failure(slot, error))
            return slot, failed

    def _run_control(self, unit: _Unit, task: ControlTask, place: ControlPlace) -> Parcels:
        """On a slot's worker: a ControlNet's pass, its residuals leaving for the slots that add them."""
        if unit.run.has_failed or self._is_cancelled():
            raise Cancelled
        try:
            watch, num_rows = Stopwatch(self._fleet.device(place.slot)), unit.call.num_rows
            residuals = task.run(place.network)
            ended = watch.stop(lambda ms: self._fleet.speeds.record(place.slot, place.work, place.work_per_row * num_rows, ms))
            _note_control(unit, place.slot, self._fleet.device(place.slot), watch.started, ended)
            return self._ship_control(unit, residuals)
        except BaseException:
            unit.run.has_failed = True
            raise

    def _ship_control(self, unit: _Unit, residuals: Control) -> Parcels:
        """The residuals on their way to where they are added, in the order of their use: middle, then from the end of a list."""
        sent: dict[str, list[Parcel | None]] = {}
        for kind in ("middle", "output"):
            targets = unit.route.control_targets[kind]
            on_way = [
                None if residual is None else self._ship(residual, unit, targets[min(place, len(targets) - 1)])
                for place, residual in enumerate(reversed(residuals.get(kind, ())))
            ]
            sent[kind] = on_way[::-1]
        return sent

    def _send_control(self, unit: _Unit) -> Control:
        """Residuals that are there from the start, each on its way to the slot that adds it: all of them, or of a deferred chain those of the
        way in."""
        if not isinstance(unit.call.control, DeferredControl):
            ready = unit.call.control or {}
        else:
            inputs: dict[str, list[Tensor | None]] = {}
            for part in unit.call.control.parts:
                if isinstance(part, Mapping):
                    inputs = add_residuals({"input": list(part.get("input", ()))}, inputs)
            ready = inputs
        sent: dict[str, list[Tensor | None]] = {}
        for kind, residuals in ready.items():
            targets = unit.route.control_targets.get(kind)
            if targets is None:
                continue
            on_way: list[Tensor | None] = []
            for place, residual in enumerate(reversed(residuals)):
                target = unit.route.devices[targets[place]] if place < len(targets) else unit.call.device
                on_way.append(None if residual is None else self._fleet.transport.send(residual, target))
            sent[kind] = on_way[::-1]
        return sent

    def _submit(self, unit: _Unit, task: Callable[[], None]) -> None:
        slot = unit.route.stages[unit.stage].slot
        future = self._fleet.worker(slot).submit(task, priority=(unit.run.number,))
        future.add_done_callback(lambda done: _fail_if_unfinished(unit, slot, done))

    def _enter(self, unit: _Unit, call: NetworkCall, control: Control) -> None:
        """On the first stage's worker: the state before the first segment."""
        call = _with_control(call, control)
        with profiler.recorder().measure("stage", "time embedding", slot=unit.route.stages[0].slot, device=unit.route.device(0), **_facts(unit)):
            unit.state = state = call.start(unit.route.replica.program)
        for slot in unit.route.devices:
            context = None if state.context_BLD is None else self._ship(state.context_BLD, unit, slot)
            unit.shared[slot] = (self._ship(state.emb_BE, unit, slot), context)
        self._run_stage(unit)

    def _resume(self, unit: _Unit) -> None:
        """On a later stage's worker: take in what arrived."""
        state, stage = unit.state, unit.route.stages[unit.stage]
        assert state is not None
        assert unit.hidden is not None
        state.hidden_BCHW = unit.hidden.receive()
        state.transformer_input_BCHW = None if unit.transformer_input is None else unit.transformer_input.receive()
        emb, context = unit.shared[stage.slot]
        state.emb_BE = emb.receive()
        state.context_BLD = None if context is None else context.receive()
        self._receive_skips(unit, stage)
        if any(state.options.get(name) for name in _HOOK_OPTIONS):
            for name in _TENSOR_OPTIONS:
                if isinstance(state.options.get(name), Tensor):
                    state.options[name] = self._fleet.transport.send(state.options[name], state.hidden_BCHW.device)
        self._run_stage(unit)

    def _receive_skips(self, unit: _Unit, stage: Stage) -> None:
        """Put those skips in place that this stage pops."""
        segments, state = unit.route.replica.program.segments, unit.state
        assert state is not None
        num_popped = sum(segments[piece.segment].kind == "output" and piece.first_block == 0 for piece in stage.pieces)
        skips: list[Any] = state.skips
        for place in range(max(0, len(skips) - num_popped), len(skips)):
            if isinstance(skips[place], _OnItsWay):
                skips[place] = skips[place].parcel.receive()

    def _run_stage(self, unit: _Unit) -> None:
        """The stage's pieces, from where the unit is. Before one that adds residuals which are not there, the unit leaves the worker."""
        state, route, stage = unit.state, unit.route, unit.route.stages[unit.stage]
        assert state is not None
        program, here = route.replica.program, route.device(unit.stage)
        unit.pieces = unit.pieces or self._pieces_of(unit, stage)
        watch = Stopwatch(here)
        while unit.pieces:
            piece = unit.pieces[0]
            if not self._take_control(unit, piece):
                ended = watch.stop(lambda busy_ms: _add_time(unit, busy_ms))
                _note_part(unit, stage, here, watch.started, ended)
                unit.control.when_ready(lambda: self._come_back(unit, stage.slot))  # type: ignore[union-attr]
                return
            if unit.run.has_failed or self._is_cancelled():
                raise Cancelled
            self._run_piece(unit, piece, stage.slot)
            if piece.end_block is None and program.segments[piece.segment].kind == "input":
                self._send_skip(unit, piece.segment, stage.slot)
            del unit.pieces[0]
        ended = watch.stop(lambda busy_ms: self._record(unit, stage, busy_ms))
        _note_stage(unit, stage, here, watch.started, ended)
        self._leave(unit)

    def _pieces_of(self, unit: _Unit, stage: Stage) -> list[Piece]:
        """The stage's pieces; the middle block by its transformer blocks where residuals, which are added behind it, may be late."""
        program = unit.route.replica.program
        if unit.control is None:
            return list(stage.pieces)
        parts = [program.finest_parts(piece) if program.segments[piece.segment].kind == "middle" else (piece,) for piece in stage.pieces]
        return [part for some in parts for part in some]

    def _take_control(self, unit: _Unit, piece: Piece) -> bool:
        """Have what a piece adds ready; False while a ControlNet is still at it. Raises: SlotFailure where one failed."""
        if unit.control is None:
            return True
        assert unit.state is not None
        kind = unit.route.replica.program.segments[piece.segment].kind
        adds = piece.first_block == 0 if kind == "output" else kind == "middle" and piece.end_block is None
        if not adds:
            return True
        if not unit.control.is_ready:
            return False
        for slot, error in unit.control.failures():
            raise _as_failure(slot, error)
        unit.control.place(unit.state.control)
        receive_next(unit.state.control, kind)
        return True

    def _come_back(self, unit: _Unit, slot: int) -> None:
        """A unit whose residuals are there goes on."""
        try:
            self._submit(unit, lambda: self._run_stage(unit))
        except RuntimeError as error:
            _fail(unit, slot, error)

    def _run_piece(self, unit: _Unit, piece: Piece, slot: int) -> None:
        """One piece; while pieces are measured, block by block with the time of each."""
        state, route = unit.state, unit.route
        assert state is not None
        program = route.replica.program
        if self._on_piece is None or unit.run.number != self._measured_run:
            program.run_piece(piece, state)
            return
        tell, num_rows = self._on_piece, unit.call.num_rows
        for part in program.finest_parts(piece):
            watch = Stopwatch(route.devices[slot])
            program.run_piece(part, state)
            watch.stop(partial(_tell_piece, tell, slot, part, num_rows))

    def _send_skip(self, unit: _Unit, segment: int, here: int) -> None:
        """The skip just pushed leaves at once if another slot will use it."""
        target = unit.route.skip_targets[segment]
        assert unit.state is not None
        skips: list[Any] = unit.state.skips
        if target != here:
            skip_BCHW = skips[-1]
            unit.sent_skip = skip_BCHW, target, self._ship(skip_BCHW, unit, target)
            skips[-1] = _OnItsWay(skip_BCHW.shape, unit.sent_skip[2])

    def _leave(self, unit: _Unit) -> None:
        """Send the hidden state to the next stage, or home."""
        state, route = unit.state, unit.route
        assert state is not None
        if unit.stage + 1 == len(route.stages):
            unit.result.set_result(self._fleet.transport.ship(state.hidden_BCHW, unit.call.device))
            unit.state = None
            return
        target = route.stages[unit.stage + 1].slot
        unit.hidden = self._ship_hidden(unit, state.hidden_BCHW, target)
        residual_BCHW = state.transformer_input_BCHW
        unit.transformer_input = None if residual_BCHW is None else self._ship(residual_BCHW, unit, target)
        slot = route.stages[unit.stage].slot
        unit.stage += 1
        last = unit.transformer_input or unit.hidden
        if isinstance(last, _Copying):
            last.when_done(lambda failure: self._go_on(unit, slot, failure))
        else:
            self._go_on(unit, slot, None)

    def _go_on(self, unit: _Unit, slot: int, failure: BaseException | None) -> None:
        if failure is not None:
            _fail(unit, slot, failure)
            return
        try:
            self._submit(unit, lambda: self._resume(unit))
        except RuntimeError as error:
            _fail(unit, unit.route.stages[unit.stage].slot, error)

    def _ship_hidden(self, unit: _Unit, hidden_BCHW: Tensor, target: int) -> Parcel:
        """The state behind an input segment is the skip it left: where that went to the same place already, it is not sent again."""
        sent, unit.sent_skip = unit.sent_skip, None
        if sent is not None and sent[0] is hidden_BCHW and sent[1] == target:
            return sent[2]
        return self._ship(hidden_BCHW, unit, target)

    def _ship(self, tensor: Tensor, unit: _Unit, slot: int) -> Parcel:
        """Start a copy to a slot. CUDA copies run beside computation by themselves; for other devices a thread of the source's waits for them."""
        target = unit.route.devices[slot]
        if tensor.device == target or not self._asynchronous or "cuda" in (tensor.device.type, target.type):
            return _blaming(slot, lambda: self._fleet.transport.ship(tensor, target))
        return self._copiers.copy(tensor.device, lambda: _blaming(slot, lambda: self._fleet.transport.send(tensor, target)))

    def _record(self, unit: _Unit, stage: Stage, busy_ms: float) -> None:
        work = unit.route.replica.work_per_row
        done = unit.call.num_rows * sum(work.get(piece, 0.0) for piece in stage.pieces)
        self._fleet.speeds.record(stage.slot, self._work, done, busy_ms + unit.busy_ms)
        unit.busy_ms = 0.0


# parcels


@dataclass(frozen=True, slots=True)
class _Copying:
    """A tensor that a copier is bringing."""

    future: Future[Tensor]

    def receive(self) -> Tensor:
        return self.future.result()

    def when_done(self, then: Callable[[BaseException | None], None]) -> None:
        self.future.add_done_callback(lambda future: then(future.exception()))


class _Copiers:
    """A thread per source device that copies, so that a slow link does not hold up computation."""

    def __init__(self) -> None:
        self._by_device: dict[torch.device, ThreadPoolExecutor] = {}
        self._lock = threading.Lock()

    def copy(self, source: torch.device, run: Callable[[], Tensor]) -> _Copying:
        with self._lock:
            pool = self._by_device.get(source)
            if pool is None:
                pool = self._by_device[source] = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"copy-{source}")
        return _Copying(pool.submit(_without_gradients, run))

    def close(self) -> None:
        with self._lock:
            for pool in self._by_device.values():
                pool.shutdown(wait=False)
            self._by_device.clear()


def _without_gradients(run: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return run()


def _tell_piece(tell: PieceTold, slot: int, piece: Piece, num_rows: int, busy_ms: float) -> None:
    tell(slot, piece, busy_ms / num_rows)


# failures


def _blaming(slot: int, run: Callable[[], Result]) -> Result:
    """`run()`, a copy to a slot: where there is no room, it is that slot's, whoever waits for the copy. Raises: SlotFailure."""
    try:
        return run()
    except torch.OutOfMemoryError as error:
        raise SlotFailure(slot, error) from None


def _fail(unit: _Unit, slot: int, error: BaseException) -> None:
    unit.run.has_failed = True
    unit.state = None
    with suppress(InvalidStateError):  # two threads may see the same failure
        unit.result.set_exception(_as_failure(slot, error))


def _fail_if_unfinished(unit: _Unit, slot: int, done: Future[None]) -> None:
    """A task that never ran (its worker was lost or closed) ends its unit too."""
    if done.cancelled():
        _fail(unit, slot, Cancelled())
    elif (error := done.exception()) is not None:
        _fail(unit, slot, error)


def _worst(failures: Iterable[BaseException]) -> BaseException:
    """What the caller should hear of: a failure before a cancellation."""
    ordered = sorted(failures, key=lambda failure: isinstance(failure, Cancelled))
    return ordered[0]


def _as_failure(slot: int, error: BaseException) -> BaseException:
    """What the caller hears of an error on a slot."""
    if isinstance(error, CancelledError):
        return Cancelled()
    return error if isinstance(error, (Cancelled, SlotFailure)) else SlotFailure(slot, error)


def _done(parcels: Parcels) -> Future[Parcels]:
    future: Future[Parcels] = Future()
    future.set_result(parcels)
    return future


def _add_time(unit: _Unit, busy_ms: float) -> None:
    unit.busy_ms += busy_ms


def _with_control(call: NetworkCall, control: Control) -> NetworkCall:
    return replace(call, control=control) if call.control is not None else call


# the record


def _facts(unit: _Unit) -> dict[str, int]:
    """What a span of the unit is marked with."""
    return {"unit": unit.profile_number, "stage": unit.stage, "step": unit.run.step, "rows": unit.call.num_rows}


def _note_stage(unit: _Unit, stage: Stage, device: torch.device, started: Mark, ended: Mark) -> None:
    """Count a stage that is done, and record it where a recorder runs."""
    profiler.meter().count_unit(stage.slot)
    recorder = profiler.recorder()
    if recorder.is_on:
        stages = unit.route.stages
        kind, name = ("unit", "whole network") if len(stages) == 1 else ("stage", f"stage {unit.stage + 1} of {len(stages)}")
        recorder.add(started, ended, devices=(device, device), kind=kind, name=name, slot=stage.slot, **_facts(unit))


def _note_part(unit: _Unit, stage: Stage, device: torch.device, started: Mark, ended: Mark) -> None:
    """Record the part of a stage that was done before its unit waited for residuals."""
    recorder = profiler.recorder()
    if recorder.is_on:
        recorder.add(started, ended, devices=(device, device), kind="stage", name="before residuals", slot=stage.slot, **_facts(unit))


def _note_control(unit: _Unit, slot: int, device: torch.device, started: Mark, ended: Mark) -> None:
    recorder = profiler.recorder()
    if recorder.is_on:
        recorder.add(started, ended, devices=(device, device), kind="ControlNet", name="ControlNet", slot=slot, **_facts(unit))
