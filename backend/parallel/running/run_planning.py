"""Plans one sampling run: takes costs and the current state of the slots, returns a plan and how to deal its rows. Moves nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from backend import memory_management
from backend.devices.slot import Slot
from backend.nn.network_call import NetworkCall
from backend.nn.owner import owner_of
from backend.nn.unet import find_forward_binding, replaced_views
from backend.parallel.placing.control_networks import ControlLink, PlannedControlNetwork, collect_control_networks, control_network_costs
from backend.parallel.placing.fleet import Fleet
from backend.parallel.planning.candidate import JobShape, deal_by_speed
from backend.parallel.planning.costs import ComponentCost, ModelProfile, with_measured_ms
from backend.parallel.planning.live_facts import assuming_idle_evicted, guess_speed, profile_of, slot_facts, speed_of
from backend.parallel.planning.plan import Piece, Plan, ReplicaPlan, TileTeam
from backend.parallel.planning.planner import make_plan
from backend.parallel.planning.profiling import profile_control_network
from backend.parallel.planning.tile_costs import TILE_EXTRA
from backend.parallel.running import status
from backend.parallel.running.bound_hooks import find_bound_hook, find_whole_hook
from backend.parallel.running.sampling_request import SamplingRequest
from backend.parallel.running.slot_budgets import SlotBudgets
from backend.parallel.running.step_trial import StepTrial
from backend.patcher.unet import UnetPatcher

logger = logging.getLogger(__name__)


class RunPlanning:
    """Makes plans for runs of `unet` over latents of `shape` (B, C, H, W). `work` is the key of measured speeds: the model and the size."""

    def __init__(self, unet: UnetPatcher, shape: Sequence[int], request: SamplingRequest, fleet: Fleet, controls: Sequence[ControlLink] = ()) -> None:
        self.unet, self.fleet, self.request = unet, fleet, request
        self._shape = unet.shape_of_cost(shape)
        self.work = f"{owner_of(unet.model).serial} {self._shape[2]}x{self._shape[3]}"
        self.control_networks = collect_control_networks(controls, self.work)
        self.budgets = SlotBudgets()
        self.trial = StepTrial(fleet, f"{self.work} {request.images}x{request.branches} {len(self.control_networks)}")
        self.profile, self.is_measured = self._make_profile()

    # costs

    def _make_profile(self) -> tuple[ModelProfile, bool]:
        """Costs of the network's pieces, and whether they are measured: by FLOPs before the first run, by measured times after it."""
        profile, times = profile_of(self.unet.model, self._shape), self.fleet.pieces.times_of(self.work)
        is_measured = {cost.piece for cost in profile.pieces} <= times.keys()
        return (with_measured_ms(profile, times), True) if is_measured else (profile, False)

    def note_piece(self, slot: int, piece: Piece, busy_ms: float) -> None:
        """Record a piece's time, scaled to the primary slot by the slots' guessed speeds."""
        self.fleet.pieces.record(self.work, piece, busy_ms * guess_speed(self.fleet.slot(slot)) / guess_speed(self.fleet.primary))

    @property
    def has_new_times(self) -> bool:
        """Whether all pieces have been measured but the profile does not use the times yet."""
        return not self.is_measured and {cost.piece for cost in self.profile.pieces} <= self.fleet.pieces.times_of(self.work).keys()

    def use_new_times(self) -> None:
        """Base the pieces' costs on measured times from now on."""
        self.profile, self.is_measured = self._make_profile()
        self.fleet.speeds.forget(self.work)

    @property
    def control_cost(self) -> ComponentCost:
        """Cost of one ControlNet for this denoiser and size. Raises: ValueError for a denoiser whose family has none."""
        height, width = self._shape[2:]
        model = self.unet.model
        cost = profile_control_network(
            model.diffusion_model, model.program, latent_height=height, latent_width=width, dtype=model.computation_dtype
        )  # fmt: skip
        if cost is None:
            raise ValueError(f"The job has a control network, but there are none for {self.profile.name}. Leave it out.")
        return cost

    # slots

    @property
    def home_slots(self) -> tuple[int, ...]:
        """Slots on the UNet patcher's load device, where the latents are."""
        return tuple(slot.index for slot in self.fleet.working_slots if slot.torch_device == self.unet.load_device)

    def usable_slots(self) -> tuple[Slot, ...]:
        """Slots the plan may use. If none has room left: the first home slot."""
        bound = self._bound_by
        home = [slot for slot in self.fleet.working_slots if slot.index in self.home_slots]
        slots = tuple(slot for slot in self.fleet.working_slots if self.budgets.share_of(slot.index) > 0)
        if bound is None:
            return slots or tuple(home[:1])
        if len(home) < len(slots):
            logger.info("%s, so the UNet stays on %s.", bound, self.unet.load_device)
        return tuple(home) or slots

    @property
    def _bound_by(self) -> str | None:
        """Why the UNet must stay on its home slots; None if it need not."""
        if self.unet.model.program.foreign_forward() is not None:
            return "an extension's forward takes the whole network"
        bound = find_bound_hook(self.unet.model_options.get("transformer_options", {}))
        return find_forward_binding(self.unet.model.diffusion_model) if bound is None else bound

    def speed(self, slot: int) -> float:
        return speed_of(self.fleet.slot(slot), self.fleet, self.work)

    def work_of(self, plan: Plan) -> str:
        """The key under which a plan's speeds are recorded. Times that include streaming say nothing about a slot's speed at the network's work."""
        return f"{self.work} streamed" if plan.streamed else self.work

    # the plan

    def make_plan(self) -> Plan:
        """The best plan for the current state of the slots; one slot if a trial showed that dividing does not pay."""
        job = JobShape(
            images=self.request.images,
            branches=self.request.branches,
            steps=self.request.steps,
            may_use_lanes=self.request.may_use_lanes,
            is_async=self.request.asynchronous,
            components=control_network_costs(self.control_networks, self.control_cost, self.fleet, self.work) if self.control_networks else (),
            control_slot=self.home_slots[0] if len(self.fleet.working_slots) > 2 else None,
            why_no_tiles=self._why_no_tiles(),
            exact_share=self._exact_share,
        )
        links = self.fleet.links
        status.set_links(links, self.fleet.verdicts)
        own = {network for control in self.control_networks for network in control.networks}
        rooms = [slot_facts(slot, self.unet, self.fleet, self.work, self.budgets.share_of(slot.index), own) for slot in self.usable_slots()]
        plans = [make_plan(self.profile, rooms, links, job, strategy=self.request.strategy)]
        if any(room.fixed_bytes for room in rooms) and (plans[0].is_single or plans[0].streamed):
            emptied = [assuming_idle_evicted(room) for room in rooms]
            plans.append(make_plan(self.profile, emptied, links, job, strategy=self.request.strategy))
        plan = min(plans, key=lambda plan: plan.predicted_ms or float("inf"))
        if (bound := self._bound_by) is not None and len(rooms) < len(self.fleet.working_slots):
            plan = replace(plan, reason=f"{plan.reason}; {bound}, so other slots cannot help")
        trial = self.trial.without_gain
        if self.request.is_free and plan.has_whole_copies and trial is not None:
            alone = make_plan(self.profile, rooms, links, job, strategy="single")
            reason = f"slot {alone.used_slots[0]} alone: a step took {trial.alone_ms:.0f} ms there and {trial.divided_ms:.0f} ms as {plan.reason}"
            return replace(alone, reason=reason)
        return plan

    @property
    def _exact_share(self) -> float:
        """Share of the run's steps in which tiles wait for each other."""
        exact_steps = self.request.displaced_after
        return 1.0 if exact_steps is None else min(1.0, exact_steps / max(1, self.request.steps))

    def _why_no_tiles(self) -> str | None:
        """Why rows of this run cannot be cut into tiles; None if they can."""
        if self.unet.reference_latents:
            return "every tile would need all reference pictures"
        hook = find_whole_hook(self.unet.model_options.get("transformer_options", {}))
        if hook is not None:
            return f"{hook} needs whole tensors"
        replaced = next(iter(replaced_views(self.unet.model.diffusion_model)), None)
        if replaced is not None:
            return f"an extension replaced the forward of {replaced}, which may need whole tensors"
        if self.control_networks and not self.unet.model.program.has_control_in_tiles:
            return "residuals of its ControlNets belong to the text too"
        return self.unet.model.program.why_no_tiles()

    def must_be_whole(self, call: NetworkCall) -> bool:
        """Whether a call cannot be cut into the plan's tiles: it has another size than the run (a part of the picture), hooks of its own, or
        residuals that cannot be cut."""
        if call.control is not None and not self.unet.model.program.has_control_in_tiles:
            return True
        return call.rows["x"].shape[-2:] != self._shape[-2:] or find_whole_hook(call.options) is not None

    # rows and bytes

    def deal_rows(self, plan: Plan, num_rows: int) -> Sequence[int]:
        """Rows for each replica by its speed: its slots' slowest speed times their number. Example: 4 rows at speeds 1 and 3 -> 1, 3.

        With tiles: rows for each team, by the sum of its slots' speeds.
        """
        if plan.is_tiled:
            return deal_by_speed(num_rows, [sum(self.speed(slot) for slot in team.slots) for team in plan.tiles])
        speeds = [min(self.speed(slot) for slot in replica.used_slots) * len(replica.used_slots) for replica in plan.replicas]
        if not self.control_networks:
            return deal_by_speed(num_rows, speeds)
        row_ms = [self.profile.work_per_row / speed for speed in speeds]
        busy_ms = [0.0] * len(speeds)
        for control in self.control_networks:
            slots = plan.control_slots[control.name]
            for place, replica in enumerate(plan.replicas):
                if slots[place] in replica.used_slots and len(set(slots)) > 1:
                    row_ms[place] += self._control_ms(control, slots[place])
                elif slots[place] in replica.used_slots:
                    busy_ms[place] += num_rows * self._control_ms(control, slots[place])
        return deal_by_speed(num_rows, [1.0 / ms for ms in row_ms], busy_ms)

    def _control_ms(self, control: PlannedControlNetwork, slot: int) -> float:
        """Time of a ControlNet's passes for one row."""
        speed = self.fleet.speeds.speed_of(slot, control.work) or self.speed(slot)
        return control.links * self.control_cost.flops_per_row / speed

    def rows_at_once(self, plan: Plan, replica: ReplicaPlan, share: int) -> int:
        """How many rows of a replica's share to run at once.

        All of them on one slot, or if lanes keep all slots busy, because larger batches take less time per row. Otherwise one. Fewer if a device
        has no room for that many.
        """
        if share < 2 or (len(replica.used_slots) > 1 and plan.lanes < len(replica.used_slots)):
            return 1
        free_bytes = min(memory_management.get_free_memory(self.fleet.device(slot)) for slot in replica.used_slots)
        num_rows = share
        while num_rows > 1 and self.estimate_bytes(num_rows) > free_bytes:
            num_rows = (num_rows + 1) // 2
        return num_rows

    def team_rows_at_once(self, team: TileTeam, share: int) -> int:
        """How many rows of a team's share to run at once: all, or fewer if a device has no room for its tiles of that many."""
        num_rows = share
        while num_rows > 1 and any(
            self._tile_bytes(num_rows, part) > memory_management.get_free_memory(self.fleet.device(slot))
            for slot, part in zip(team.slots, team.shares)
        ):
            num_rows = (num_rows + 1) // 2
        return num_rows

    def _tile_bytes(self, num_rows: int, share: float) -> int:
        """Estimated working memory of `num_rows` tiles at once."""
        return int(self.estimate_bytes(num_rows) * min(1.0, share + TILE_EXTRA))

    def working_bytes(self, plan: Plan) -> int:
        """Estimated working memory of one slot: for its whole share of rows on one slot or in replicas, for one or two rows in stages."""
        num_rows = self.request.num_rows
        if plan.is_tiled:
            dealt = self.deal_rows(plan, num_rows)
            return max(self._tile_bytes(rows, max(team.shares)) for rows, team in zip(dealt, plan.tiles))
        if plan.is_replicated:
            num_rows = max(self.deal_rows(plan, num_rows))
        elif not plan.is_single:
            num_rows = 1 if plan.lanes < 2 else self.request.branches
        return self.estimate_bytes(num_rows)

    def estimate_bytes(self, num_rows: int) -> int:
        """Estimated working memory of `num_rows` rows at once."""
        estimate = self.unet.model_options.get("memory_peak_estimation_modifier", self.unet.memory_required)
        return int(estimate([num_rows, *self._shape[1:]]))
