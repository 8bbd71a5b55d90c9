"""Carries out a plan of tiles: each row is computed by a team of slots, a tile on each, and the tiles are joined in order.

Every slot of a team has a whole copy of the network. Its worker runs the tile from exchange to exchange; while a tile waits, the worker is free
for other rows. Example: one row of 64 latent rows on slots 0 and 1, rows (40, 24): slot 0 makes the output's rows 0 to 39, slot 1 the others.

Parts: `exchange.meeting` (messages), `exchange.tile_task` (suspends and resumes), `tile_controls` (ControlNets). Must not know guidance, samplers,
memory policy, families of networks or how the plan was made.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from backend import profiler
from backend.nn.deferred_control import add_residual
from backend.nn.network_call import NetworkCall
from backend.nn.program import ProgramState, Segment
from backend.nn.tiles import Cut, Tile
from backend.parallel.exchange.copies import Copiers
from backend.parallel.exchange.meeting import Meeting, ReleasedError, TilePeers
from backend.parallel.exchange.tile_task import Later, TileTask, TileWork
from backend.parallel.exchange.transport import Transfer
from backend.parallel.placing.fleet import Fleet
from backend.parallel.planning.plan import TileTeam
from backend.parallel.running.displaced import DisplacedPasses, KeptPass
from backend.parallel.running.failures import Cancelled, SlotFailure, as_failure, worst_of
from backend.parallel.running.residuals import ResidualChain
from backend.parallel.running.routing import Replica
from backend.parallel.running.row_batch import Run
from backend.parallel.running.stopwatch import Stopwatch
from backend.parallel.running.tile_controls import TileControls, TileResiduals


@dataclass(frozen=True, slots=True, eq=False)
class Team:
    """A plan's team of slots with the copy of the network on each. `controls` of its first replica are where its ControlNets run."""

    plan: TileTeam
    replicas: tuple[Replica, ...]
    devices: tuple[torch.device, ...]

    @property
    def cut(self) -> Cut:
        return Cut.of_rows(self.plan.rows)


def make_teams(replicas: Sequence[Replica], tiles: Sequence[TileTeam], device_of: Callable[[int], torch.device]) -> tuple[Team, ...]:
    """Teams of replicas, which are in the order of the teams."""
    left = iter(replicas)
    return tuple(
        Team(team, tuple(next(left) for _ in team.slots), tuple(device_of(slot) for slot in team.slots)) for team in tiles
    )  # fmt: skip


@dataclass(slots=True, eq=False)
class _Pass:
    """Rows of a call that a team computes together. `busy_ms`: how long each slot was busy with them so far. `kept`: what the next pass of these rows
    may use, in a run with displaced passes."""

    call: NetworkCall
    team: Team
    run: Run
    number: int
    kept: KeptPass | None = None
    tasks: list[TileTask[Transfer]] = field(default_factory=list)
    residuals: TileResiduals | None = None
    busy_ms: list[float] = field(default_factory=list)

    def stop(self, done: Future[Transfer]) -> None:
        """The other rows of the call stop at their next exchange if these failed."""
        if done.exception() is not None:
            self.run.has_failed = True

    def facts(self) -> dict[str, int]:
        """What identifies these rows in a span."""
        return {"batch": self.number, "stage": 0, "step": self.run.step, "rows": self.call.num_rows}


class TileExecutor:
    """Runs calls on the teams of a plan. `run` may be called from several threads at once; their rows share the slots."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        tiles: Sequence[TileTeam],
        fleet: Fleet,
        *,
        deal: Callable[[int], Sequence[int]],
        rows_per_batch: Callable[[TileTeam, int], int] = lambda team, share: share,
        work: str = "",
        asynchronous: bool = True,
        is_cancelled: Callable[[], bool] = lambda: False,
        displaced: DisplacedPasses | None = None,
    ) -> None:
        """As `Executor`; `deal` and `rows_per_batch` are for teams instead of replicas. `displaced`: which passes need not wait for other tiles; None
        if all wait."""
        self._fleet, self._work = fleet, work
        self._teams = make_teams(replicas, tiles, fleet.device)
        self._deal, self._rows_per_batch = deal, rows_per_batch
        self._is_cancelled, self._displaced = is_cancelled, displaced
        self._numbers = count()
        self._copiers = Copiers(fleet, asynchronous=asynchronous)
        self._controls = TileControls(fleet, self._copiers, is_cancelled)

    @property
    def deferred_networks(self) -> frozenset[nn.Module]:
        """ControlNets that every team has a slot for."""
        return frozenset.intersection(*(frozenset(team.replicas[0].controls) for team in self._teams))

    def close(self) -> None:
        if self._displaced is not None:
            self._displaced.forget()
        self._copiers.close()

    def run(self, call: NetworkCall) -> Tensor:
        """The network's output for all rows, on the call's device. Raises: Cancelled, SlotFailure."""
        recorder = profiler.recorder()
        run = Run(next(self._numbers), recorder.step)
        passes = [_Pass(call.take_rows(first, end), team, run, recorder.next_batch()) for team, first, end in self._deal_rows(call.num_rows)]
        self._prepare_exchanges(call, passes)
        failures: list[BaseException] = []
        for one in passes:
            try:
                self._start(one)
            except SlotFailure as error:
                run.has_failed = True
                failures.append(error)
        try:
            output = self._gather(passes, failures, call.device)
            if self._displaced is not None:
                self._displaced.keep([one.kept for one in passes if one.kept is not None])
            return output
        except BaseException:
            if self._displaced is not None:
                self._displaced.forget()
            raise
        finally:
            for one in passes:
                one.tasks.clear()  # otherwise a pass and its tasks keep each other, and tensors, alive

    def _prepare_exchanges(self, call: NetworkCall, passes: Sequence[_Pass]) -> None:
        """In a run with displaced passes: keep this call's messages, and give it those of the call before if it may use them."""
        if self._displaced is None:
            return
        self._displaced.admits(call)  # otherwise there is nothing to take
        for place, one in enumerate(passes):
            before = self._displaced.take(place, one.team.plan)
            one.kept = KeptPass.follow(before, one.team.plan, self._make_meeting(one.team))

    def _make_meeting(self, team: Team) -> Meeting:
        slots = team.plan.slots
        return Meeting(team.devices, lambda tensor, rank: self._copiers.ship(tensor, slots[rank]))

    def run_whole(self, call: NetworkCall) -> Tensor:
        """The network's output for a call that cannot be cut as planned, from the first slot of the first team. Raises: SlotFailure."""
        team = self._teams[0]
        slot, program = team.plan.slots[0], team.replicas[0].program
        sent = self._send_inputs(call, slot, team.devices[0])
        done = self._fleet.worker(slot).submit(lambda: program.run(sent.start(program)), priority=(next(self._numbers),))
        if (error := done.exception()) is not None:
            raise as_failure(slot, error)
        return self._fleet.transport.send(done.result(), call.device)

    def _deal_rows(self, num_rows: int) -> list[tuple[Team, int, int]]:
        """Assign rows to teams in order, `rows_per_batch` at once."""
        dealt, first = [], 0
        for team, share in zip(self._teams, self._deal(num_rows)):
            step = max(1, self._rows_per_batch(team.plan, share))
            dealt += [(team, start, min(start + step, first + share)) for start in range(first, first + share, step)]
            first += share
        return dealt

    def _start(self, one: _Pass) -> None:
        """Send the inputs to every slot of the team and start its tiles. Raises: SlotFailure; then no tile has started."""
        team, slots = one.team, one.team.plan.slots
        meeting = self._make_meeting(team) if one.kept is None else one.kept.meeting
        one.residuals = self._controls.start(one.call, team.replicas, team.plan, one.run)
        one.busy_ms = [0.0] * len(slots)
        calls = [self._send_inputs(one.call, slot, device) for slot, device in zip(slots, team.devices)]
        one.tasks = [
            TileTask(self._run_tile(one, rank, call, meeting), partial(self._submit, one, rank), meeting, rank) for rank, call in enumerate(calls)
        ]
        for task in one.tasks:
            task.result.add_done_callback(one.stop)
            task.start()

    def _send_inputs(self, call: NetworkCall, slot: int, device: torch.device) -> NetworkCall:
        try:
            return call.on(device, self._fleet.transport.send)
        except RuntimeError as error:  # out of memory there, or the slot is lost
            raise SlotFailure(slot, error) from error

    def _submit(self, one: _Pass, rank: int, function: Callable[[], None]) -> Future[None]:
        return self._fleet.worker(one.team.plan.slots[rank]).submit(self._timed, one, rank, function, priority=(one.run.number,))

    def _timed(self, one: _Pass, rank: int, function: Callable[[], None]) -> None:
        """A tile's work up to its next wait, on its slot's worker."""
        slot, device = one.team.plan.slots[rank], one.team.devices[rank]

        def add(busy_ms: float) -> None:
            one.busy_ms[rank] += busy_ms

        watch = Stopwatch(device)
        function()
        ended = watch.stop(add)
        recorder = profiler.recorder()
        if recorder.is_on:
            name = f"tile {rank + 1} of {len(one.team.devices)}"
            recorder.add(watch.started, ended, devices=(device, device), kind="stage", name=name, slot=slot, **one.facts())

    def _gather(self, passes: Sequence[_Pass], failures: list[BaseException], device: torch.device) -> Tensor:
        """Results in row order. All tiles have ended when this returns or raises, so nothing keeps running after it."""
        started = [task for one in passes for task in one.tasks]
        wait([task.result for task in started])
        for task in started:
            if task.meeting.before is None or task.result.exception() is not None:
                task.meeting.wait_for_copies()
        for one in passes:
            failures += [as_failure(slot, error) for slot, error in _failures_of(one)]
            if one.residuals is not None:
                failures += [as_failure(slot, error) for slot, error in one.residuals.failures()]
        if failures:
            raise worst_of(sorted(failures, key=_is_of_a_device))
        outputs = [torch.cat([task.result.result().receive() for task in one.tasks], dim=2) for one in passes]
        for one in passes:
            self._record(one)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _record(self, one: _Pass) -> None:
        """Each slot's speed, from the time in which it did not wait for others."""
        control_work = 0.0 if one.residuals is None else one.residuals.tiled_work_per_row
        for slot, replica, share, busy_ms in zip(one.team.plan.slots, one.team.replicas, one.team.plan.shares, one.busy_ms):
            profiler.meter().count_stage_run(slot)
            work_per_row = sum(replica.work_per_row.values()) + control_work
            self._fleet.speeds.record(slot, self._work, one.call.num_rows * share * work_per_row, busy_ms)

    # one tile, on its slot's worker

    def _run_tile(self, one: _Pass, rank: int, call: NetworkCall, meeting: Meeting) -> TileWork[Transfer]:
        def check() -> None:
            if one.run.has_failed or self._is_cancelled():
                raise Cancelled

        program, residuals = one.team.replicas[rank].program, one.residuals
        tile = Tile(TilePeers(meeting, rank, check), one.team.cut, norms=None if one.kept is None else one.kept.norms[rank])
        state = program.start_tile(call.rows, tile, options=call.options)
        if residuals is not None:
            state.residuals.update((yield from residuals.compute_own(rank, tile, program)))
        for segment in program.segments:
            check()
            if residuals is not None and (chain := residuals.chain(rank)) is not None:
                yield from _take_residuals(segment, state, chain)
            yield from segment.run_tile(state, tile)
        return self._fleet.transport.ship(state.tensors[program.output], one.call.device)


def _take_residuals(segment: Segment, state: ProgramState, chain: ResidualChain) -> Generator[Later, object, None]:
    """Put the residuals that a segment adds into the state; wait for them if a ControlNet is still computing. Raises: SlotFailure if one failed."""
    additions = [one for one in segment.adds if one.kind in chain.kinds]
    if not additions:
        return
    if not chain.is_ready:
        yield chain
    for slot, error in chain.failures():
        raise as_failure(slot, error)
    for addition in additions:
        if (residual := chain.take(addition)) is not None:
            state.residuals[addition] = add_residual(state.residuals.get(addition), residual)


def _failures_of(one: _Pass) -> list[tuple[int, BaseException]]:
    """Slot and error of each tile that failed by itself."""
    found = [(slot, error) for slot, task in zip(one.team.plan.slots, one.tasks) if (error := task.result.exception()) is not None]
    return [(slot, error) for slot, error in found if not isinstance(error, ReleasedError)]


def _is_of_a_device(failure: BaseException) -> bool:
    """Whether both ends of a failed copy may have it; a worker that found its slot lost says more."""
    return isinstance(getattr(failure, "cause", failure), torch.AcceleratorError)
