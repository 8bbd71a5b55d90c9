"""A sampling run over several slots: makes the plan, places its networks, runs calls, and shrinks the plan when a slot fails.

One session serves one run. Knows no samplers, prompts or options; a `SamplingRequest` describes the run.

Example: two pictures on two slots.

    begin_session   `run_planning` makes the plan "2 replicas", `placement` loads a replica module on slot 1, the session becomes the KModel's runner
    run             per step the executor deals four rows 2:2; `step_trial` runs one early step on one slot to check that dividing pays
    slot 1 is full  `_recover` evicts idle models from it and repeats the step; the second time `slot_budgets` gives it less and the session replans
    end_session     the runner is removed; replica modules stay until something needs their room
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backend import memory_management, profiler
from backend.memory.errors import OutOfMemory
from backend.nn.network_call import NetworkCall
from backend.nn.owner import owner_of
from backend.nn.program import Program
from backend.parallel.placing.control_networks import ControlLink, place_control_networks
from backend.parallel.placing.fleet import Fleet, current_fleet
from backend.parallel.placing.placement import PlacedPlan, place_plan
from backend.parallel.planning.live_facts import guess_speed as guess_speed
from backend.parallel.planning.live_facts import work_of_pieces
from backend.parallel.planning.plan import Plan, ReplicaPlan
from backend.parallel.running import status
from backend.parallel.running.bound_hooks import find_bound_hook as find_bound_hook
from backend.parallel.running.displaced import DisplacedPasses
from backend.parallel.running.executor import Executor, SlotFailure
from backend.parallel.running.lost_slots import find_dead_slots, lose_slots
from backend.parallel.running.one_slot import OneSlot
from backend.parallel.running.run_gate import RunGate
from backend.parallel.running.run_planning import RunPlanning
from backend.parallel.running.sampling_request import SamplingRequest as SamplingRequest
from backend.parallel.running.sampling_request import foresee_calls
from backend.parallel.running.tile_executor import TileExecutor
from backend.parallel.running.worker import SlotLost
from backend.patcher.base import ModelPatcher
from backend.patcher.unet import UnetPatcher

logger = logging.getLogger(__name__)


class SamplingSession:
    """The current plan of one run. `plan` may change during the run. The session is the network's `Runner` while the plan uses other slots.

    `was_displaced`: whether a step used what tiles had sent in the step before, so that the result is an approximation.
    """

    plan: Plan
    was_displaced: bool

    def __init__(
        self,
        unet: UnetPatcher,
        shape: Sequence[int],
        request: SamplingRequest,
        fleet: Fleet,
        *,
        extra_models: Sequence[ModelPatcher] = (),
        controls: Sequence[ControlLink] = (),
        preserved_bytes: int = 0,
    ) -> None:
        self.unet, self.fleet, self.request = unet, fleet, request
        self.planning = RunPlanning(unet, shape, request, fleet, controls)
        self._extra_models, self._preserved_bytes = tuple(extra_models), preserved_bytes
        self._gate, self._generation = RunGate(), 0
        self._num_calls, self._first_s, self._last_s = 0, 0.0, 0.0
        fleet.is_divided = request.may_divide
        self._placed: PlacedPlan | None = None
        self._executor: Executor | TileExecutor | None = None
        self._one_slot = OneSlot(unet)
        self._displaced: DisplacedPasses | None = None
        self.was_displaced = False
        self._adopt_fitting()

    @property
    def is_parallel(self) -> bool:
        """Whether the network runs on worker threads instead of the calling thread."""
        return self._executor is not None

    @property
    def deferred_networks(self) -> frozenset[nn.Module]:
        return frozenset(control.network for control in self.planning.control_networks)

    def close(self) -> None:
        """Let the network run without a plan again. Copies stay on their slots until something else needs the room."""
        self._tell_status(self.measured_ms)
        self.unet.model.runner = None
        if self._executor is not None:
            self._executor.close()

    @property
    def measured_ms(self) -> float | None:
        """Average time of a step of all pictures so far; None before the second step, and if the calling thread runs the network itself."""
        if self._num_calls < 2 * max(1, self.plan.lanes):
            return None
        num_steps = self._num_calls / max(1, self.plan.lanes)
        return (self._last_s - self._first_s) * 1000.0 / num_steps

    def _tell_status(self, measured_ms: float | None = None) -> None:
        """Publish what the page and the API show about the plan."""
        num_rows = self.request.num_rows
        rows = self._deal(num_rows) if len(self.plan.replicas) > 1 else (num_rows,)
        if self.plan.is_tiled:
            rows = [count for count, team in zip(rows, self.plan.tiles) for _ in team.slots]
        status.set_current_plan(self.plan, rows=rows, measured_ms=measured_ms)
        status.set_speeds({slot.index: self.planning.speed(slot.index) for slot in self.fleet.working_slots})

    # placing

    def _adopt_fitting(self) -> None:
        """Adopt the best plan that fits. A slot that runs out of memory gets a smaller share. Raises: OutOfMemory if one slot is too small."""
        while True:
            with profiler.recorder().measure("plan", "make a plan"):
                plan = self.planning.make_plan()
            try:
                self._adopt(plan)
                self._tell_status()
                profiler.recorder().note_plan(plan)
                return
            except OutOfMemory as error:
                home = self.planning.home_slots
                short = [slot.index for slot in self.planning.usable_slots() if str(slot.torch_device) == error.device]
                if not short or (plan.used_slots == home[:1] and set(short) <= set(home)):
                    raise
            memory_management.hold_models([])
            for slot in short:
                self.planning.budgets.give_less(slot, self.fleet.device(slot))

    def _adopt(self, plan: Plan) -> None:
        """Place what the plan needs and use the plan from now on. Raises: OutOfMemory, SlotLost."""
        self.plan, planning = plan, self.planning
        if plan.is_single and set(plan.used_slots) <= set(planning.home_slots) and not plan.has_control_elsewhere:
            self._placed = self._executor = None
            self._one_slot = OneSlot(self.unet, (*self._extra_models, *(control.patcher for control in planning.control_networks)))
            self._one_slot.place(working_bytes=planning.working_bytes(plan), preserved_bytes=self._preserved_bytes)
            self._begin_recording(self.unet.model.program)
            return
        controls, control_patchers = (
            place_control_networks(planning.control_networks, plan, self.fleet, planning.control_cost) if planning.control_networks else ((), ())
        )
        self._placed = place_plan(
            self.unet,
            plan,
            self.fleet,
            working_bytes=planning.working_bytes(plan),
            preserved_bytes=self._preserved_bytes,
            extra_models=(*self._extra_models, *control_patchers),
            work_per_row=work_of_pieces(plan, planning.profile),
            controls=controls,
        )
        self._executor = self._execute_tiles(self._placed) if plan.is_tiled else self._execute_rows(self._placed)
        self._begin_recording(*(replica.program for replica in self._placed.replicas))
        self.unet.model.runner = self

    def _begin_recording(self, *programs: Program) -> None:
        for program in programs:
            begin_recording(program, self.request)

    def _execute_tiles(self, placed: PlacedPlan) -> TileExecutor:
        exact_steps = self.request.displaced_after
        self._displaced = None if exact_steps is None else DisplacedPasses(exact_steps * self.request.calls_per_step)
        return TileExecutor(
            placed.replicas,
            placed.plan.tiles,
            self.fleet,
            deal=self._deal,
            rows_per_batch=self.planning.team_rows_at_once,
            work=self.planning.work,
            asynchronous=self.request.asynchronous,
            is_cancelled=self.request.is_cancelled,
            displaced=self._displaced,
        )

    def _execute_rows(self, placed: PlacedPlan) -> Executor:
        planning, plan = self.planning, placed.plan
        return Executor(
            placed.replicas,
            self.fleet,
            deal=self._deal,
            rows_per_batch=self._rows_per_batch,
            work=planning.work_of(plan),
            asynchronous=self.request.asynchronous,
            is_cancelled=self.request.is_cancelled,
            on_piece=None if planning.is_measured or plan.streamed or not plan.is_one_cut else planning.note_piece,
            measured_run=max(1, plan.lanes),
        )

    def _deal(self, num_rows: int) -> Sequence[int]:
        return self.planning.deal_rows(self.plan, num_rows)

    def _rows_per_batch(self, replica: ReplicaPlan, share: int) -> int:
        return self.planning.rows_at_once(self.plan, replica, share)

    # running

    def run(self, call: NetworkCall) -> Tensor:
        """The network's output for all rows. If a slot runs out of memory or dies, the step is repeated with less on that slot or without it.

        Raises: Cancelled; OutOfMemory if even one slot is too small; SlotLost if the weights were on the lost slot; SlotFailure.
        """
        while True:
            generation = self._generation
            try:
                with self._gate:
                    output = self._run_once(call)
                self._reconsider(generation)
                self._judge_trial(generation)
                return output
            except SlotFailure as error:
                failure = error
            self._recover(failure, generation)

    def _run_once(self, call: NetworkCall) -> Tensor:
        began_s, executor, trial = time.perf_counter(), self._executor, self.planning.trial
        is_alone = trial.is_alone(self._num_calls) and self._is_tried
        if executor is None:
            output = self._one_slot.run(call)
        elif isinstance(executor, TileExecutor) and self.planning.must_be_whole(call):
            output = executor.run_whole(call)
        else:
            output = self._run_alone(call, executor) if is_alone else executor.run(call)
        if trial.is_early(self._num_calls) and self._is_tried:
            memory_management.synchronize(call.device)
            trial.note((time.perf_counter() - began_s) * 1000.0)
        self._first_s, self._last_s = self._first_s or began_s, time.perf_counter()
        self._num_calls += 1
        self.was_displaced |= self._displaced is not None and self._displaced.num_displaced > 0
        return output

    def _run_alone(self, call: NetworkCall, executor: Executor | TileExecutor) -> Tensor:
        """Run the step on this slot alone. If it has no room for all rows, run it as planned and end the trial."""
        try:
            return self._one_slot.run(call)
        except torch.OutOfMemoryError:
            self.planning.trial.give_up()
        memory_management.soft_empty_cache(force=True)
        return executor.run(call)

    @property
    def _is_tried(self) -> bool:
        """Whether to run one early step on one slot: if the planner chose replicas or tiles itself and this slot has one of them."""
        planning = self.planning
        return (
            self.request.is_free
            and self.plan.has_whole_copies
            and not planning.trial.is_known
            and self._placed is not None
            and self.unet in self._placed.patchers
            and all(set(slots) & set(planning.home_slots) for slots in self.plan.control_slots.values())
            and planning.estimate_bytes(self.request.num_rows) < memory_management.get_free_memory(self.unet.load_device)
        )

    # another plan

    def _judge_trial(self, generation: int) -> None:
        """Stop dividing if the trial showed that it does not pay."""
        if not self.planning.trial.judge():
            return
        with self._gate.alone():
            if generation == self._generation:
                self._generation += 1
                self._replan()

    def _reconsider(self, generation: int) -> None:
        """Once all pieces have been measured, cut the network again if the times give another cut."""
        planning = self.planning
        if not self.plan.is_one_cut or not planning.has_new_times:
            return
        with self._gate.alone():
            if generation != self._generation or planning.is_measured:
                return
            self._generation += 1
            planning.use_new_times()
            if planning.make_plan().replicas != self.plan.replicas:
                self._replan()

    def _recover(self, failure: SlotFailure, generation: int) -> None:
        with self._gate.alone():
            if generation != self._generation:
                return  # another lane has already recovered
            self._generation += 1
            lost = self._find_lost(failure)
            if lost:
                self._go_on_without(lost)
            elif memory_management.is_out_of_memory(failure.cause):
                self._make_room(failure.slot)
            else:
                raise failure from failure.cause

    def _find_lost(self, failure: SlotFailure) -> list[SlotLost]:
        """Slots whose devices are dead. Checked only if a device reported an error."""
        if not isinstance(failure.cause, (SlotLost, torch.AcceleratorError)) or memory_management.is_out_of_memory(failure.cause):
            return []
        return find_dead_slots(self.fleet)

    def _go_on_without(self, lost: Sequence[SlotLost]) -> None:
        """Plan without these slots, unless the network's own weights are on one of them."""
        lose_slots(self.fleet, lost)
        gone = {one.slot.torch_device for one in lost}
        own = {tensor.device for tensor in self.unet.model.parameters()}
        if gone & own or not self.fleet.working_slots:
            raise lost[0]
        logger.warning("%s The step is repeated without it.", lost[0])
        self._replan()

    def _make_room(self, slot: int) -> None:
        """The first time, evict idle models from the slot; after that give the slot less of the network, and finally none."""
        device = self.fleet.device(slot)
        if self.planning.budgets.is_first_shortage(slot):
            logger.warning("Out of memory on slot %d (%s) during a step: idle models are evicted, and the step is repeated.", slot, device)
            memory_management.soft_empty_cache(force=True)
            memory_management.free_memory(0, device, free_all=True)
            return
        self.planning.budgets.give_less(slot, device)
        self._replan()

    def _replan(self) -> None:
        if self._executor is not None:
            self._executor.close()
        memory_management.hold_models([])
        memory_management.soft_empty_cache(force=True)
        self._adopt_fitting()
        logger.info("%s", self.plan.reason)


def begin_session(
    unet: UnetPatcher, shape: Sequence[int], request: SamplingRequest, *, extra_models: Sequence[ModelPatcher] = (),
    controls: Sequence[ControlLink] = (), preserved_bytes: int = 0,
) -> SamplingSession | None:  # fmt: skip
    """A session for a run over latents of `shape` (B, C, H, W); None with fewer than two working slots. Raises: OutOfMemory.

    `extra_models` are loaded on the UNet's device; `controls` are ControlNets that the plan places.
    """
    fleet = current_fleet()
    if len(fleet.working_slots) < 2:
        status.set_current_plan(None)
        profiler.recorder().note_plan(None)
        return None
    shape, request = foresee_calls(unet.model_options.get("model_function_wrapper"), shape, request)
    session = SamplingSession(unet, shape, request, fleet, extra_models=extra_models, controls=controls, preserved_bytes=preserved_bytes)
    owner_of(unet.model).put(session)
    logger.info("%s", session.plan.reason)
    return session


def begin_recording(program: Program, request: SamplingRequest) -> None:
    """A run without a session begins: from now on launches of this program are recorded as the request says, where its device can."""
    recorder = current_fleet().recorder
    if recorder is not None:
        recorder.begin_run(program, request.graphs)


def end_session(unet: UnetPatcher) -> None:
    """End the session of a run over this network, if there is one."""
    session: SamplingSession | None = owner_of(unet.model).take(SamplingSession)
    if session is not None:
        session.close()
