"""A sampling run over several slots: the plan is made, its networks are placed, calls are run, and when a slot fails the plan shrinks.

One session serves one run. Knows no samplers, prompts or options; what the run is like comes in a `SamplingRequest`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from backend import memory_management, profiler
from backend.devices.slot import Slot
from backend.memory.errors import OutOfMemory
from backend.nn.network_call import NetworkCall
from backend.nn.owner import owner_of
from backend.parallel import status
from backend.parallel.costs import ComponentCost, ModelProfile, with_measured_ms
from backend.parallel.executor import Executor, SlotFailure
from backend.parallel.fleet import Fleet, Trial, current_fleet
from backend.parallel.live_facts import guess_speed, profile_of, slot_facts, speed_of, without_others, work_of_pieces
from backend.parallel.lost_slots import find_silent_slots, lose_slots
from backend.parallel.placement import PlacedPlan, place_plan, place_whole
from backend.parallel.plan import Piece, Plan, ReplicaPlan
from backend.parallel.planner import LEAST_GAIN, JobShape, WantedStrategy, deal_units, make_plan
from backend.parallel.profiling import profile_controlnet
from backend.parallel.riders import ControlLink, Rider, collect_riders, place_riders, rider_costs
from backend.parallel.worker import SlotLost
from backend.patcher.base import ModelPatcher
from backend.patcher.unet import UnetPatcher

logger = logging.getLogger(__name__)

_RETRY_SHARE = 0.75
"""What is left of a slot's budget, for the planner, after work on it ran out of memory a second time."""
_LAST_SHORTAGE = 5
_TRIAL_CALL = 2
"""The step, counted from 0, that is done alone; the first warms the machine up, the second is compared with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRequest:
    """What a run asks of the plan. `branches`: conditions per picture and step. `strategy`: auto, replicas, layers or single."""

    images: int = 1
    branches: int = 2
    steps: int = 20
    strategy: WantedStrategy = "auto"
    asynchronous: bool = True
    may_use_lanes: bool = False
    is_cancelled: Callable[[], bool] = field(default=lambda: False)

    @property
    def may_divide(self) -> bool:
        """Whether more than one slot may work on it."""
        return self.strategy != "single"

    @property
    def is_free(self) -> bool:
        """Whether the planner chooses the strategy."""
        return self.strategy == "auto"


@dataclass(slots=True)
class _Gate:
    """Many runs at a time, or one change of the plan."""

    _running: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._changed:
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds new runs back and waits for those under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)
            yield


class SamplingSession:
    """The plan in force for one run. `plan` may change while it lasts."""

    plan: Plan

    def __init__(
        self,
        unet: UnetPatcher,
        shape: Sequence[int],
        request: SamplingRequest,
        fleet: Fleet,
        *,
        beside: Sequence[ModelPatcher] = (),
        controls: Sequence[ControlLink] = (),
        preserved_bytes: int = 0,
    ) -> None:
        self.unet, self.fleet, self.request = unet, fleet, request
        self._shape = tuple(shape)
        self._work = f"{owner_of(unet.model).serial} {self._shape[2]}x{self._shape[3]}"
        self._riders = collect_riders(controls, self._work)
        self._beside, self._preserved_bytes = tuple(beside), preserved_bytes
        self._profile = self._make_profile()
        self._budget_shares: dict[int, float] = {}
        self._shortages: Counter[int] = Counter()
        self._gate, self._generation = _Gate(), 0
        self._num_calls, self._first_s, self._last_s = 0, 0.0, 0.0
        self._trial_ms: list[float] = []
        fleet.is_divided = request.may_divide
        self._placed: PlacedPlan | None = None
        self._executor: Executor | None = None
        self._adopt_fitting()

    @property
    def is_parallel(self) -> bool:
        """Whether the network runs elsewhere than in the calling thread."""
        return self._executor is not None

    def close(self) -> None:
        """Let the network run as it does without a plan. Copies stay on their slots until something else needs the room."""
        self._tell_status(self.measured_ms)
        self.unet.model.runner = None
        if self._executor is not None:
            self._executor.close()

    @property
    def deferred_networks(self) -> frozenset[torch.nn.Module]:
        return frozenset(rider.network for rider in self._riders)

    @property
    def measured_ms(self) -> float | None:
        """Time of a step of all the pictures so far; None before the second step, and where the network runs as without a plan."""
        if self._num_calls < 2 * max(1, self.plan.lanes):
            return None
        num_steps = self._num_calls / max(1, self.plan.lanes)
        return (self._last_s - self._first_s) * 1000.0 / num_steps

    def _tell_status(self, measured_ms: float | None = None) -> None:
        """What the page and the API show of the plan."""
        slots = self.fleet.working_slots
        units = (
            self._deal(self.request.images * self.request.branches) if len(self.plan.replicas) > 1 else (self.request.images * self.request.branches,)
        )
        status.set_current_plan(self.plan, units=units, measured_ms=measured_ms)
        status.set_speeds({slot.index: self._speed(slot.index) for slot in slots})

    # planning

    def _make_profile(self) -> ModelProfile:
        """Costs of the network's pieces: by FLOPs before the first run, by measured time after."""
        profile, times = profile_of(self.unet.model, self._shape), self.fleet.pieces.times_of(self._work)
        self._is_measured = {cost.piece for cost in profile.pieces} <= times.keys()
        return with_measured_ms(profile, times) if self._is_measured else profile

    def _make_plan(self) -> Plan:
        job = JobShape(
            images=self.request.images,
            branches=self.request.branches,
            steps=self.request.steps,
            may_use_lanes=self.request.may_use_lanes,
            is_async=self.request.asynchronous,
            components=rider_costs(self._riders, self._control_cost, self.fleet, self._work) if self._riders else (),
            rider_slot=self._home_slots()[0] if len(self.fleet.working_slots) > 2 else None,
        )
        links = self.fleet.links
        status.set_links(links, self.fleet.verdicts)
        own = {network for rider in self._riders for network in rider.networks}
        rooms = [slot_facts(slot, self.unet, self.fleet, self._work, self._budget_shares.get(slot.index, 1.0), own) for slot in self._usable_slots()]
        plans = [make_plan(self._profile, rooms, links, job, strategy=self.request.strategy)]
        if any(room.fixed_bytes for room in rooms) and plans[0].is_single:
            emptied = [without_others(room) for room in rooms]
            plans.append(make_plan(self._profile, emptied, links, job, strategy=self.request.strategy))
        plan = min(plans, key=lambda plan: plan.predicted_ms or float("inf"))
        trial = self.fleet.trials.get(self._trial_key)
        if self.request.is_free and plan.is_replicated and trial is not None and trial.speedup < LEAST_GAIN:
            alone = make_plan(self._profile, rooms, links, job, strategy="single")
            reason = f"slot {alone.used_slots[0]} alone: a step took {trial.alone_ms:.0f} ms there and {trial.divided_ms:.0f} ms as {plan.reason}"
            return replace(alone, reason=reason)
        return plan

    @property
    def _trial_key(self) -> str:
        return f"{self._work} {self.request.images}x{self.request.branches} {len(self._riders)}"

    def _usable_slots(self) -> tuple[Slot, ...]:
        """Slots the plan may use; the first at home where no other has room left."""
        bound = find_bound_hook(self.unet.model_options.get("transformer_options", {}))
        home = [slot for slot in self.fleet.working_slots if slot.index in self._home_slots()]
        slots = tuple(slot for slot in self.fleet.working_slots if self._budget_shares.get(slot.index, 1.0) > 0)
        if bound is None:
            return slots or tuple(home[:1])
        if len(home) < len(slots):
            logger.info("%s holds tensors of %s, so the UNet stays there.", bound, self.unet.load_device)
        return tuple(home) or slots

    def _adopt_fitting(self) -> None:
        """Adopt the best plan whose networks find room; a slot where they do not gets less. Raises: OutOfMemory where one slot is too small too."""
        while True:
            with profiler.recorder().measure("plan", "make a plan"):
                plan = self._make_plan()
            try:
                self._adopt(plan)
                self._tell_status()
                profiler.recorder().note_plan(plan)
                return
            except OutOfMemory as error:
                short = [slot.index for slot in self._usable_slots() if str(slot.torch_device) == error.device]
                if not short or (plan.used_slots == self._home_slots()[:1] and set(short) <= set(self._home_slots())):
                    raise
            memory_management.hold_models([])
            for slot in short:
                self._give_less(slot)

    def _give_less(self, slot: int) -> None:
        """The planner sees a smaller slot from now on, and after the third shortage none."""
        self._shortages[slot] = max(2, self._shortages[slot] + 1)
        share = _RETRY_SHARE * self._budget_shares.get(slot, 1.0) if self._shortages[slot] < _LAST_SHORTAGE else 0.0
        self._budget_shares[slot] = share
        logger.warning(
            "Out of memory on slot %d (%s): the plan is made anew with %.0f %% of its memory.", slot, self.fleet.device(slot), 100 * share
        )  # fmt: skip

    def _home_slots(self) -> tuple[int, ...]:
        """Slots of the device that the UNet's patcher calls home, where the latents are."""
        return tuple(slot.index for slot in self.fleet.working_slots if slot.torch_device == self.unet.load_device)

    def _adopt(self, plan: Plan) -> None:
        """Place what the plan needs and run by it from now on. Raises: OutOfMemory, SlotLost."""
        self.plan = plan
        if plan.is_single and set(plan.used_slots) <= set(self._home_slots()) and not plan.has_control_apart:
            self._run_at_home()
            return
        controls, riding = place_riders(self._riders, plan, self.fleet, self._control_cost) if self._riders else ((), ())
        self._placed = place_plan(
            self.unet,
            plan,
            self.fleet,
            working_bytes=self._working_bytes(plan),
            preserved_bytes=self._preserved_bytes,
            beside=(*self._beside, *riding),
            work_per_row=work_of_pieces(plan, self._profile),
            controls=controls,
        )
        self._executor = Executor(
            self._placed.replicas,
            self.fleet,
            deal=self._deal,
            rows_per_batch=self._rows_per_batch,
            work=self._work,
            asynchronous=self.request.asynchronous,
            is_cancelled=self.request.is_cancelled,
            on_piece=None if self._is_measured or not plan.is_one_cut else self._note_piece,
            measured_run=max(1, plan.lanes),
        )
        self.unet.model.runner = self

    def _run_at_home(self) -> None:
        place_whole(self.unet)
        self._placed = self._executor = None
        self.unet.model.runner = None
        models = [self.unet, *self._beside, *(rider.patcher for rider in self._riders)]
        memory_management.load_models_gpu(models, memory_required=self._working_bytes(self.plan), hard_memory_preservation=self._preserved_bytes)
        memory_management.hold_models(models)

    def _working_bytes(self, plan: Plan) -> int:
        """Estimate for one slot: its share of the rows at once on one slot or in replicas, a row or two where units flow through stages."""
        num_rows = self.request.images * self.request.branches
        if plan.is_replicated:
            num_rows = max(self._deal_rows(plan, num_rows))
        elif not plan.is_single:
            num_rows = 1 if plan.lanes < 2 else self.request.branches
        return self._estimate_bytes(num_rows)

    def _deal(self, num_rows: int) -> Sequence[int]:
        return self._deal_rows(self.plan, num_rows)

    def _deal_rows(self, plan: Plan, num_rows: int) -> Sequence[int]:
        """Rows by the speed of each replica: that of its slot, or of its slowest where it has several."""
        speeds = [min(self._speed(slot) for slot in replica.used_slots) * len(replica.used_slots) for replica in plan.replicas]
        if not self._riders:
            return deal_units(num_rows, speeds)
        row_ms = [self._profile.work_per_row / speed for speed in speeds]
        busy_ms = [0.0] * len(speeds)
        for rider in self._riders:
            slots = plan.control_slots[rider.name]
            for place, replica in enumerate(plan.replicas):
                if slots[place] in replica.used_slots and len(set(slots)) > 1:
                    row_ms[place] += self._rider_ms(rider, slots[place])
                elif slots[place] in replica.used_slots:
                    busy_ms[place] += num_rows * self._rider_ms(rider, slots[place])
        return deal_units(num_rows, [1.0 / ms for ms in row_ms], busy_ms)

    def _rider_ms(self, rider: Rider, slot: int) -> float:
        """Time of a ControlNet's passes for a row."""
        speed = self.fleet.speeds.speed_of(slot, rider.work) or self._speed(slot)
        return rider.links * self._control_cost.flops_per_row / speed

    @property
    def _control_cost(self) -> ComponentCost:
        """Costs of one ControlNet for this denoiser and size."""
        height, width = self._shape[2:]
        model = self.unet.model
        return profile_controlnet(model.diffusion_model.config, latent_height=height, latent_width=width, dtype=model.computation_dtype)

    def _rows_per_batch(self, replica: ReplicaPlan, share: int) -> int:
        """All rows of a share at once on one slot, and where lanes keep all slots busy, as larger batches take less per row; else row by row.

        Fewer where a device has no room for so many.
        """
        if share < 2 or (len(replica.used_slots) > 1 and self.plan.lanes < len(replica.used_slots)):
            return 1
        free_bytes = min(memory_management.get_free_memory(self.fleet.device(slot)) for slot in replica.used_slots)
        num_rows = share
        while num_rows > 1 and self._estimate_bytes(num_rows) > free_bytes:
            num_rows = (num_rows + 1) // 2
        return num_rows

    def _estimate_bytes(self, num_rows: int) -> int:
        """Working memory of so many rows at once."""
        estimate = self.unet.model_options.get("memory_peak_estimation_modifier", self.unet.memory_required)
        return int(estimate([num_rows, *self._shape[1:]]))

    def _speed(self, slot: int) -> float:
        return speed_of(self.fleet.slot(slot), self.fleet, self._work)

    # running

    def run(self, call: NetworkCall) -> Tensor:
        """The network's output for all rows. A step that a slot could not do is done again with less on that slot.

        Raises: Cancelled; OutOfMemory where one slot is too small too; SlotLost where the weights went with the slot; SlotFailure.
        """
        while True:
            generation = self._generation
            try:
                with self._gate.running():
                    output = self._run_once(call)
                self._reconsider(generation)
                self._judge_trial(generation)
                return output
            except SlotFailure as error:
                failure = error
            self._recover(failure, generation)

    def _run_once(self, call: NetworkCall) -> Tensor:
        began_s, executor = time.perf_counter(), self._executor
        is_trial = self._num_calls == _TRIAL_CALL and self._is_tried
        if executor is None:
            output = self.unet.model.run_here(call)
        else:
            output = self._run_alone(call, executor) if is_trial else executor.run(call)
        if self._is_tried and self._num_calls <= _TRIAL_CALL + 1:
            memory_management.synchronize(call.device)
            self._trial_ms.append((time.perf_counter() - began_s) * 1000.0)
        self._first_s, self._last_s = self._first_s or began_s, time.perf_counter()
        self._num_calls += 1
        return output

    def _run_alone(self, call: NetworkCall, executor: Executor) -> Tensor:
        """The step on this slot; as planned where it has no room for all rows, which ends the trial."""
        try:
            return self.unet.model.run_here(call)
        except torch.OutOfMemoryError:
            self.fleet.trials[self._trial_key] = Trial(divided_ms=1.0, alone_ms=float("inf"))
        memory_management.soft_empty_cache(force=True)
        return executor.run(call)

    @property
    def _is_tried(self) -> bool:
        """Whether one early step is to be done on one slot alone, to see that dividing it pays: predictions know no cost of small kernels.

        Only where whole copies were chosen freely and this slot holds one; once per model, size and number of rows.
        """
        return (
            self.request.is_free
            and self.plan.is_replicated
            and self._trial_key not in self.fleet.trials
            and self._placed is not None
            and self.unet in self._placed.patchers
            and all(set(slots) & set(self._home_slots()) for slots in self.plan.control_slots.values())
            and self._estimate_bytes(self.request.images * self.request.branches) < memory_management.get_free_memory(self.unet.load_device)
        )

    def _judge_trial(self, generation: int) -> None:
        """After the trial and a step on either side of it: keep what was measured, and divide no more where that did not pay."""
        if len(self._trial_ms) < _TRIAL_CALL + 2 or self._trial_key in self.fleet.trials:
            return
        before, alone, after = self._trial_ms[_TRIAL_CALL - 1 :][:3]
        trial = self.fleet.trials[self._trial_key] = Trial(divided_ms=min(before, after), alone_ms=alone)
        if trial.speedup >= LEAST_GAIN:
            return
        with self._gate.alone():
            if generation == self._generation:
                self._generation += 1
                self._adopt_anew()

    def _note_piece(self, slot: int, piece: Piece, busy_ms: float) -> None:
        """Times of slots of unlike speed are made alike by what is guessed of the slots."""
        self.fleet.pieces.record(self._work, piece, busy_ms * guess_speed(self.fleet.slot(slot)) / guess_speed(self.fleet.primary))

    def _reconsider(self, generation: int) -> None:
        """When all pieces have been measured: cut again where the times say so."""
        if self._is_measured or not self.plan.is_one_cut or not self._all_measured():
            return
        with self._gate.alone():
            if generation != self._generation or self._is_measured:
                return
            self._generation += 1
            self._profile = self._make_profile()
            self.fleet.speeds.forget(self._work)
            before = self.plan.replicas
            if self._make_plan().replicas != before:
                self._adopt_anew()

    def _all_measured(self) -> bool:
        return {cost.piece for cost in self._profile.pieces} <= self.fleet.pieces.times_of(self._work).keys()

    def _recover(self, failure: SlotFailure, generation: int) -> None:
        with self._gate.alone():
            if generation != self._generation:
                return  # another lane has seen to it
            self._generation += 1
            lost = self._find_lost(failure)
            if lost:
                self._go_on_without(lost)
            elif memory_management.is_out_of_memory(failure.cause):
                self._make_room(failure.slot)
            else:
                raise failure from failure.cause

    def _find_lost(self, failure: SlotFailure) -> list[SlotLost]:
        """Slots that do not answer any more. Only asked for when a device reported an error of its own."""
        if not isinstance(failure.cause, (SlotLost, torch.AcceleratorError)) or memory_management.is_out_of_memory(failure.cause):
            return []
        return find_silent_slots(self.fleet)

    def _go_on_without(self, lost: Sequence[SlotLost]) -> None:
        """Plan without these slots, where the network itself is not on one of them."""
        lose_slots(self.fleet, lost)
        gone = {one.slot.torch_device for one in lost}
        own = {tensor.device for tensor in self.unet.model.parameters()}
        if gone & own or not self.fleet.working_slots:
            raise lost[0]
        logger.warning("%s The step is done again without it.", lost[0])
        self._adopt_anew()

    def _make_room(self, slot: int) -> None:
        """First what is idle leaves the slot, then the slot gets less of the network, then none."""
        device = self.fleet.device(slot)
        if self._shortages[slot] == 0:
            self._shortages[slot] = 1
            logger.warning("Out of memory on slot %d (%s) in a step: what is idle leaves it, and the step is done again.", slot, device)
            memory_management.soft_empty_cache(force=True)
            memory_management.free_memory(0, device, free_all=True)
            return
        self._give_less(slot)
        self._adopt_anew()

    def _adopt_anew(self) -> None:
        if self._executor is not None:
            self._executor.close()
        memory_management.hold_models([])
        memory_management.soft_empty_cache(force=True)
        self._adopt_fitting()
        logger.info("%s", self.plan.reason)


def begin_session(
    unet: UnetPatcher, shape: Sequence[int], request: SamplingRequest, *, beside: Sequence[ModelPatcher] = (),
    controls: Sequence[ControlLink] = (), preserved_bytes: int = 0,
) -> SamplingSession | None:  # fmt: skip
    """A session for a run over latents of `shape` (B, C, H, W); None where there is one slot only. Raises: OutOfMemory.

    `beside` are models that come along on the UNet's device, `controls` links whose networks the plan finds places for.
    """
    fleet = current_fleet()
    if len(fleet.working_slots) < 2:
        status.set_current_plan(None)
        profiler.recorder().note_plan(None)
        return None
    session = SamplingSession(unet, shape, request, fleet, beside=beside, controls=controls, preserved_bytes=preserved_bytes)
    owner_of(unet.model).put(session)
    logger.info("%s", session.plan.reason)
    return session


def end_session(unet: UnetPatcher) -> None:
    """End the session of a run over this network, if there is one."""
    session: SamplingSession | None = owner_of(unet.model).take(SamplingSession)
    if session is not None:
        session.close()


# hooks


def find_bound_hook(options: dict[str, object]) -> str | None:
    """The first hook inside the network that holds tensors or modules of its own, by its name; such a hook binds the network to their device."""
    for hook in _hooks_of(options):
        cells = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or () if _is_filled(cell)]
        held = [hook, *cells, *getattr(getattr(hook, "__self__", None), "__dict__", {}).values(), *getattr(hook, "__dict__", {}).values()]
        if any(isinstance(one, (Tensor, torch.nn.Module)) for one in held) or hasattr(hook, "to"):
            return str(getattr(hook, "__qualname__", type(hook).__name__))
    return None


def _is_filled(cell: object) -> bool:
    try:
        return cell.cell_contents is not None  # type: ignore[attr-defined]
    except ValueError:
        return False


def _hooks_of(options: dict[str, object]) -> Iterator[object]:
    for name in ("patches", "patches_replace"):
        for hooks in (options.get(name) or {}).values():  # type: ignore[attr-defined]
            yield from hooks.values() if isinstance(hooks, dict) else hooks
    for name in ("block_modifiers", "block_inner_modifiers"):
        yield from options.get(name) or ()  # type: ignore[misc]
    for name in ("group_norm_wrapper", "groupnorm_wrapper"):
        if options.get(name) is not None:
            yield options[name]
