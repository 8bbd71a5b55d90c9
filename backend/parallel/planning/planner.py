"""Decides which slots compute a sampling run, and how: the plan with the least predicted time among those that fit. Pure arithmetic.

Measured speeds enter through the facts: the caller keeps a smoothed speed per slot (FLOPs of a row / its measured ms) and passes fresh
`SlotFacts` each time it plans. Measured times per piece enter through the profile (`costs.with_measured_ms`). The planner keeps no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, combinations
from typing import Literal

from backend.memory.budget import DEFAULT_INFERENCE_BYTES, partial_load_budget_bytes, reserve_bytes
from backend.nn.tiles import CannotTile
from backend.parallel.planning.candidate import LEAST_GAIN, Candidate, JobShape, deal_by_speed
from backend.parallel.planning.copy_costs import CopyCosts, SharedControls
from backend.parallel.planning.costs import ModelProfile, merge_pieces
from backend.parallel.planning.cut_costs import PartitionJob
from backend.parallel.planning.cut_search import MOST_NESTED
from backend.parallel.planning.partition import partition
from backend.parallel.planning.pipeline import StepRows
from backend.parallel.planning.plan import Plan, ReplicaPlan, Strategy, StreamedWeights
from backend.parallel.planning.plan_reasons import PlanReasons
from backend.parallel.planning.slot_facts import Link as Link
from backend.parallel.planning.slot_facts import LinkTable
from backend.parallel.planning.slot_facts import SlotFacts as SlotFacts
from backend.parallel.planning.tile_costs import Team, TileCosts

WantedStrategy = Literal["auto", "single", "replicas", "tiles", "layers", "hybrid"]

SAME_TIME = 0.01
_ALL_SUBSETS_UP_TO = 6
_ALL_GROUPINGS_UP_TO = 4
_SPEED_STEP = 1.03
_BYTES_STEP = 2**26
"""Searching cuts over more than two slots takes seconds. Rounding speeds to 3 % and bytes to 64 MiB lets the cache find an earlier search."""


def make_plan(profile: ModelProfile, slots: Sequence[SlotFacts], links: Sequence[Link], job: JobShape, *, strategy: WantedStrategy = "auto") -> Plan:
    """The plan for a run. The first slot is the primary: it has the latents.

    auto picks the least predicted time among the plans that fit: one slot, unless several are predicted to be LEAST_GAIN times faster or no
    single slot has room for the network. If none has, plans in which a part of the weights streams from main memory compete too. A named strategy
    is used if it fits, layers also if they stream; otherwise auto decides and the reason says so.
    Raises: ValueError without slots.
    """
    if not slots:
        raise ValueError("A plan over no slots was requested. Give at least one slot (--device-id).")
    return _Planner(profile, tuple(slots), tuple(links), job).make(strategy)


class _Planner:
    """Candidates and the choice between them, for one request."""

    def __init__(self, profile: ModelProfile, slots: tuple[SlotFacts, ...], links: tuple[Link, ...], job: JobShape) -> None:
        self._profile, self._slots, self._links, self._job = profile, slots, links, job
        self._facts = {slot.index: slot for slot in slots}
        self._table = LinkTable(links)
        self._primary = slots[0]
        self._copies = CopyCosts(profile, slots, self._table, job)
        self._reasons = PlanReasons(profile, slots, job, self._streaming_single)

    def make(self, wanted: WantedStrategy) -> Plan:
        single = self._best_single()
        if wanted == "auto":
            return self._choose(single, "")
        makers: dict[str, Callable[[], Iterator[Candidate]]] = {
            "single": lambda: iter((single,) if single is not None else ()),
            "replicas": self._replica_sets,
            "tiles": self._tiles,
            "layers": lambda: self._layer_cuts(math.inf),
            "hybrid": lambda: self._hybrids(math.inf),
        }
        found = self._best(makers[wanted]())
        if found is None and wanted == "layers":
            found = self._best(self._layer_cuts(math.inf, may_stream=True))
        if found is not None:
            return self._as_plan(found, single, f"{self._reasons.describe(found, single)}; {wanted} was requested")
        return self._choose(single, f"{wanted} was requested but {self._reasons.why_not(wanted)}; ")

    # the choice

    def _choose(self, single: Candidate | None, prefix: str) -> Plan:
        best = self._best_of_many(single)
        if single is None:
            best = self._best_without_room(best)
            return self._as_plan(best, None, f"{prefix}{self._reasons.describe(best, None)}")
        if best is None or best.step_ms * LEAST_GAIN > single.step_ms:
            return self._as_plan(single, single, f"{prefix}{self._reasons.why_single(single, best)}")
        return self._as_plan(best, single, f"{prefix}{self._reasons.describe(best, single)}")

    def _best_single(self) -> Candidate | None:
        """The home slot if it is about as fast as the fastest, else the fastest: moving copies the weights, and measured speeds fluctuate."""
        found = list(self._singles())
        best = self._best(iter(found))
        homes = {slot.index for slot in self._slots if slot.is_home}
        at_home = self._best(candidate for candidate in found if homes.issuperset(candidate.slot_indexes))
        return at_home if best is not None and at_home is not None and at_home.step_ms <= best.step_ms * LEAST_GAIN else best

    def _best_of_many(self, single: Candidate | None) -> Candidate | None:
        """The best plan over several slots. Cuts are searched only if they could beat the best plan found so far."""
        known = self._best(chain(self._replica_sets(), self._singles_with_control_elsewhere()))
        limit_ms = min((candidate.step_ms for candidate in (known, single) if candidate is not None), default=math.inf)
        layers = self._best(self._layer_cuts(limit_ms))
        limit_ms = min(limit_ms, layers.step_ms if layers else math.inf)
        hybrid = self._best(self._hybrids(limit_ms))
        best = self._best(candidate for candidate in (known, layers, hybrid) if candidate is not None)
        tiles = self._best(self._tiles())
        return tiles if tiles is not None and (best is None or tiles.step_ms * LEAST_GAIN <= best.step_ms) else best

    def _best_without_room(self, resident: Candidate | None) -> Candidate:
        """No single slot holds the network. `resident`: the best plan whose weights all stay on their slots.

        Streaming is used if it is predicted to be LEAST_GAIN times faster, and over several slots if that is LEAST_GAIN times faster than to one.
        Cuts that stream are searched over all sets of slots only if no other plan fits: where more slots hold everything, few fast ones may win.
        """
        alone = self._streaming_single()
        if resident is not None and resident.step_ms <= alone.step_ms * LEAST_GAIN:
            alone = resident
        cut = self._best(self._layer_cuts(alone.step_ms / LEAST_GAIN, may_stream=True, most_slots=None if resident is None else 2))
        return cut if cut is not None and cut.step_ms * LEAST_GAIN <= alone.step_ms else alone

    def _best(self, candidates: Iterator[Candidate]) -> Candidate | None:
        """Least time. Within SAME_TIME: fewer slots, then fewer crossing bytes, then lower slot indexes."""
        pool = list(candidates)
        if not pool:
            return None
        least_ms = min(candidate.step_ms for candidate in pool)
        same = [candidate for candidate in pool if candidate.step_ms <= least_ms * (1 + SAME_TIME)]
        return min(same, key=lambda candidate: (candidate.num_slots, candidate.crossing_bytes, candidate.step_ms, candidate.slot_indexes))

    # candidates

    def _singles(self) -> Iterator[Candidate]:
        for slot in self._slots:
            candidate = self._whole_copies((slot,), "single")
            if candidate is not None:
                yield candidate

    def _replica_sets(self) -> Iterator[Candidate]:
        for subset in self._subsets(2):
            for shared_controls in self._copies.shared_control_places(subset):
                candidate = self._whole_copies(subset, "replicas", shared_controls)
                if candidate is not None:
                    yield candidate

    def _singles_with_control_elsewhere(self) -> Iterator[Candidate]:
        """One copy with ControlNets on other slots."""
        for slot in self._slots:
            for shared_controls in self._copies.shared_control_places((slot,)):
                candidate = self._whole_copies((slot,), "single", shared_controls) if shared_controls else None
                if candidate is not None:
                    yield candidate

    def _tiles(self) -> Iterator[Candidate]:
        """Rows in tiles on teams of slots, each slot with a whole copy."""
        if self._profile.tiles is None or self._job.why_no_tiles is not None:
            return
        costs = TileCosts(self._profile, self._profile.tiles, self._table, self._job, self._slots)
        for subset in self._subsets(2):
            for teams in costs.teams(subset):
                for placed in costs.control_places(teams):
                    candidate = self._in_tiles(placed, teams)
                    if candidate is not None:
                        yield candidate

    def _in_tiles(self, costs: TileCosts, teams: tuple[Team, ...]) -> Candidate | None:
        """These teams' rows, dealt by the teams' speeds; None if they do not fit or the picture has too few rows for so many tiles."""
        try:
            tiles = tuple(costs.plan_team(team) for team in teams)
        except CannotTile:
            return None
        dealt = deal_by_speed(self._job.num_rows, [1.0 / costs.team_ms(team, one, 1) for team, one in zip(teams, tiles)])
        peak_bytes, component_slots = costs.place(teams, tiles, dealt)
        if min(dealt) == 0 or not self._fits(peak_bytes, [*(slot for team in teams for slot in team), *costs.shared_controls.values()]):
            return None
        pieces = merge_pieces([cost.piece for cost in self._profile.pieces])
        ends_ms = [costs.team_ms(team, one, rows) for team, one, rows in zip(teams, tiles, dealt)]
        members = tuple(slot.index for team in teams for slot in team)
        shared = costs.shared_controls
        return Candidate(
            strategy="tiles",
            groups=tuple(one.slots for one in tiles),
            replicas=tuple(ReplicaPlan(pieces=pieces, slots=(slot.index,) * len(pieces)) for team in teams for slot in team),
            step_ms=max(*ends_ms, costs.launches_ms(teams, dealt)),
            peak_bytes=peak_bytes,
            crossing_bytes=costs.crossing_bytes(teams, tiles, dealt),
            component_slots=component_slots,
            dealt=dealt,
            control_slots={
                control.name: (shared[control.name].index,) * len(members) if control.name in shared else members
                for control in self._job.control_networks
            },
            tiles=tiles,
        )

    def _layer_cuts(self, limit_ms: float, *, may_stream: bool = False, most_slots: int | None = None) -> Iterator[Candidate]:
        """Cuts over sets of slots; with `may_stream` those in which some slot streams."""
        subsets = [subset for subset in self._subsets(2) if len(subset) <= MOST_NESTED or len(self._slots) in (len(subset), len(subset) + 1)]
        subsets = [subset for subset in subsets if most_slots is None or len(subset) <= most_slots]
        for subset in self._distinct(sorted(subsets, key=len, reverse=True)):
            if may_stream and not any(slot.may_stream for slot in subset):
                continue
            if self._lower_bound_ms((subset,)) * (1 + SAME_TIME) < limit_ms:
                candidate = self._grouped((subset,), "layers", may_stream=may_stream)
                if candidate is not None and bool(candidate.streamed) is may_stream:
                    limit_ms = min(limit_ms, candidate.step_ms)
                    yield candidate

    def _hybrids(self, limit_ms: float) -> Iterator[Candidate]:
        for groups in self._groupings():
            if self._lower_bound_ms(groups) * (1 + SAME_TIME) < limit_ms:
                candidate = self._grouped(groups, "hybrid")
                if candidate is not None:
                    limit_ms = min(limit_ms, candidate.step_ms)
                    yield candidate

    def _subsets(self, least: int) -> Iterator[tuple[SlotFacts, ...]]:
        """Sets of slots worth trying: all sets of a few slots; of many slots, for each size the fastest and those with the most free bytes."""
        count = len(self._slots)
        if count <= _ALL_SUBSETS_UP_TO:
            for length in range(least, count + 1):
                yield from combinations(self._slots, length)
            return
        orders = (sorted(self._slots, key=lambda slot: -slot.speed), sorted(self._slots, key=lambda slot: -slot.free_bytes))
        seen = set()
        for length in range(least, count + 1):
            for order in orders:
                chosen = {slot.index for slot in order[:length]}
                if frozenset(chosen) not in seen:
                    seen.add(frozenset(chosen))
                    yield tuple(slot for slot in self._slots if slot.index in chosen)

    def _distinct(self, subsets: Iterable[tuple[SlotFacts, ...]]) -> Iterator[tuple[SlotFacts, ...]]:
        """Skips subsets whose slots differ from an earlier subset's only in their index."""
        seen = set()
        for subset in subsets:
            signature = self._signature(subset)
            if signature not in seen:
                seen.add(signature)
                yield subset

    def _signature(self, group: tuple[SlotFacts, ...]) -> tuple[tuple[str, ...], ...]:
        """A group without slot indexes: its slots' facts, and the links between them and to the primary."""
        ends = (*group, *(() if self._primary in group else (self._primary,)))
        links = sorted(repr(self._table.facts(one, other)) for one in ends for other in ends)
        return tuple(sorted(f"{slot is self._primary} {slot.facts_without_index()}" for slot in group)), tuple(links)

    def _groupings(self) -> Iterator[tuple[tuple[SlotFacts, ...], ...]]:
        """Ways to form several copies, at least one of them cut over slots."""
        count = len(self._slots)
        if count < 3:
            return
        if count <= _ALL_GROUPINGS_UP_TO:
            seen = set()
            for groups in _set_partitions(self._slots):
                signature = tuple(sorted(self._signature(group) for group in groups))
                if 1 < len(groups) < count and signature not in seen:
                    seen.add(signature)
                    yield groups
            return
        by_room = sorted(self._slots, key=lambda slot: -slot.free_bytes)
        for length in range(2, count // 2 + 1):
            num_groups = count // length
            dealt: list[list[SlotFacts]] = [[] for _ in range(num_groups)]
            for place, slot in enumerate(by_room[: num_groups * length]):
                turn, at = divmod(place, num_groups)
                dealt[at if turn % 2 == 0 else num_groups - 1 - at].append(slot)
            yield tuple(tuple(sorted(group, key=lambda slot: slot.index)) for group in dealt)

    def _lower_bound_ms(self, groups: Sequence[Sequence[SlotFacts]]) -> float:
        """Lower bound for copies over these groups: the work shared perfectly, one row on the fastest slot, and the time to launch everything."""
        slots = [slot for group in groups for slot in group]
        work = self._profile.work_per_row + sum(component.flops_per_row for component in self._job.control_networks)
        shared_ms, row_ms = self._job.num_rows * work / sum(slot.speed for slot in slots), work / max(slot.speed for slot in slots)
        return max(shared_ms, row_ms, self._launches_ms(groups, self._deal_to(groups)))

    def _deal_to(self, groups: Sequence[Sequence[SlotFacts]]) -> tuple[int, ...]:
        """Rows per group, by the speeds of all slots in it."""
        return deal_by_speed(self._job.num_rows, [sum(slot.speed for slot in group) for group in groups])

    def _launches_ms(self, groups: Sequence[Sequence[SlotFacts]], dealt: Sequence[int]) -> float:
        """Launch time of all groups together, as they share one interpreter. A stage takes one row at a time, a whole copy several."""
        ways = [(group, num_rows if len(group) > 1 else len(self._copies.forwards(num_rows))) for group, num_rows in zip(groups, dealt)]
        return self._profile.num_kernels * sum(num_forwards * max(slot.kernel_ms for slot in group) for group, num_forwards in ways)

    # whole copies

    def _whole_copies(self, slots: tuple[SlotFacts, ...], strategy: Strategy, shared_controls: SharedControls | None = None) -> Candidate | None:
        costs = self._copies.with_shared_controls(shared_controls or {})
        speeds = [1.0 / costs.copy_ms(slot, 1) for slot in slots]
        dealt = deal_by_speed(self._job.num_rows, speeds, [costs.busy_ms(slot) for slot in slots])
        if len(slots) > 1 and min(dealt) == 0:
            return None
        peak_bytes, component_slots = costs.place(slots, dealt)
        if not self._fits(peak_bytes, (*slots, *costs.shared_controls.values())):
            return None
        away = sum(rows for slot, rows in zip(slots, dealt) if self._table.crosses(self._primary, slot))
        pieces = merge_pieces([cost.piece for cost in self._profile.pieces])
        return Candidate(
            strategy=strategy,
            groups=tuple((slot.index,) for slot in slots),
            replicas=tuple(ReplicaPlan(pieces=pieces, slots=(slot.index,) * len(pieces)) for slot in slots),
            step_ms=max(*costs.ends_ms(slots, dealt), costs.launches_ms(slots, dealt)),
            peak_bytes=peak_bytes,
            crossing_bytes=away * self._profile.copy_bytes_per_row + costs.residual_bytes(slots, dealt),
            component_slots=component_slots,
            dealt=dealt,
            control_slots={
                control.name: tuple(costs.shared_controls.get(control.name, slot).index for slot in slots) for control in self._job.control_networks
            },
        )

    def _fits(self, peak_bytes: dict[int, int], slots: Sequence[SlotFacts]) -> bool:
        """Whether every device of these slots has room. A device's fixed bytes count once."""
        for device in {slot.device for slot in slots}:
            neighbors = [slot for slot in self._slots if slot.device == device]
            shared_bytes = sum(slot.fixed_bytes for slot in neighbors) - max(slot.fixed_bytes for slot in neighbors)
            if sum(peak_bytes[slot.index] for slot in neighbors) - shared_bytes > min(slot.budget_bytes for slot in neighbors):
                return False
        return True

    # copies that stream

    def _streaming_single(self) -> Candidate:
        """One slot that holds what it can while the rest streams: the fastest, or home if about as fast. The last resort, so it need not fit."""
        slots = [slot for slot in self._slots if slot.may_stream] or self._slots
        found = [self._stream_to(slot) for slot in slots]
        best = min(found, key=lambda candidate: (candidate.step_ms, -self._facts[candidate.groups[0][0]].free_bytes))
        homes = [candidate for candidate in found if self._facts[candidate.groups[0][0]].is_home and candidate.step_ms <= best.step_ms * LEAST_GAIN]
        return homes[0] if homes else best

    def _stream_to(self, slot: SlotFacts) -> Candidate:
        """A whole copy on a slot that is too small for it, with the bytes that memory management would leave there."""
        profile, job = self._profile, self._job
        controls_bytes = sum(control.weight_bytes for control in job.control_networks)
        reserved_bytes = reserve_bytes(DEFAULT_INFERENCE_BYTES, slot.total_bytes)
        budget_bytes = partial_load_budget_bytes(max(0, slot.free_bytes - controls_bytes), reserved_bytes)
        resident_bytes = max(0, budget_bytes - slot.layers_in_flight * profile.largest_layer_bytes)
        streamed = StreamedWeights(budget_bytes=budget_bytes, streamed_bytes=max(0, profile.weight_bytes - resident_bytes))
        forwards_ms = self._copies.copy_ms(slot, job.num_rows)
        num_forwards = len(self._copies.forwards(job.num_rows))
        fetch_ms = num_forwards * float(slot.fetch_ms(streamed.streamed_bytes, forwards_ms / num_forwards))
        pieces = merge_pieces([cost.piece for cost in profile.pieces])
        return Candidate(
            strategy="single",
            groups=((slot.index,),),
            replicas=(ReplicaPlan(pieces=pieces, slots=(slot.index,) * len(pieces)),),
            step_ms=forwards_ms + fetch_ms,
            peak_bytes={one.index: one.budget_bytes if one is slot else one.fixed_bytes for one in self._slots},
            crossing_bytes=0,
            component_slots={},
            dealt=(job.num_rows,),
            control_slots={control.name: (slot.index,) for control in job.control_networks},
            streamed={slot.index: streamed},
        )

    # copies cut over slots

    def _grouped(self, groups: tuple[tuple[SlotFacts, ...], ...], strategy: Strategy, *, may_stream: bool = False) -> Candidate | None:
        """Copies, each over a group of slots, with rows dealt by each group's throughput. With `may_stream`: one copy, text encoders and VAE left
        out, because they take turns with a network that fills the slots."""
        dealt = self._deal_to(groups)
        if min(dealt) == 0:
            return None
        parts = [self._group(group, rows, place, may_stream) for place, (group, rows) in enumerate(zip(groups, dealt))]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        peak_bytes = {slot.index: slot.fixed_bytes for slot in self._slots}
        component_slots: dict[str, int] = {}
        control_slots = {control.name: tuple(part.component_slots[control.name] for part in found) for control in self._job.control_networks}
        for part in found:
            peak_bytes.update({index: part.peak_bytes[index] for group in part.groups for index in group})
            component_slots.update(part.component_slots)
        return Candidate(
            strategy=strategy,
            groups=tuple(tuple(slot.index for slot in group) for group in groups),
            replicas=tuple(part.replicas[0] for part in found),
            step_ms=max(*(part.step_ms for part in found), self._launches_ms(groups, dealt)),
            peak_bytes=peak_bytes,
            crossing_bytes=sum(part.crossing_bytes for part in found),
            component_slots=component_slots,
            dealt=dealt,
            control_slots=control_slots,
            imbalance=max(part.imbalance for part in found),
            streamed={slot: one for part in found for slot, one in part.streamed.items()},
        )

    def _group(self, group: tuple[SlotFacts, ...], num_rows: int, place: int, may_stream: bool) -> Candidate | None:
        """One copy over one group. Components that do not run per row go to the first group's slots."""
        movable = self._job.components if place == 0 and not may_stream else self._job.control_networks
        if len(group) == 1:
            job = replace(self._job, images=num_rows, branches=1, components=movable)
            planner = _Planner(self._profile, group, self._links, job)
            return planner._whole_copies(group, "single")
        found = partition(
            self._profile, group if len(group) == 2 else tuple(map(_rounded, group)), self._links,
            PartitionJob(
                step_rows=self._share_of_rows(num_rows), movable=movable, max_crossing_bytes=self._job.max_crossing_bytes, least_slots=len(group),
                control_slot=self._control_slot(group),
                is_async=self._job.is_async, may_stream=may_stream,
            ),
        )  # fmt: skip
        if found is None or not self._group_fits(group, found.peak_bytes):
            return None
        kernels_ms = self._launches_ms((group,), (num_rows,))
        away_ms, away_bytes = self._transfer_to(group[0], num_rows)
        return Candidate(
            strategy="layers",
            groups=(tuple(slot.index for slot in group),),
            replicas=(found.replica,),
            step_ms=max(found.step_ms, kernels_ms) + away_ms,
            peak_bytes=found.peak_bytes,
            crossing_bytes=found.crossing_bytes + away_bytes,
            component_slots=found.component_slots,
            dealt=(num_rows,),
            imbalance=found.imbalance,
            streamed=found.streamed,
        )

    def _control_slot(self, group: tuple[SlotFacts, ...]) -> int | None:
        return self._job.control_slot if any(slot.index == self._job.control_slot for slot in group) else None

    def _transfer_to(self, slot: SlotFacts, num_rows: int) -> tuple[float, int]:
        """ms and bytes to move latents and results between the primary and a group's first slot."""
        if not self._table.crosses(self._primary, slot):
            return 0.0, 0
        num_bytes = self._profile.copy_bytes_per_row
        return 2 * self._table.latency_ms(self._primary, slot) + num_bytes * self._table.ms_per_byte(self._primary, slot), num_rows * num_bytes

    def _share_of_rows(self, num_rows: int) -> StepRows:
        """A copy's rows: whole images if possible, else branches of one image that end their step together."""
        if num_rows % self._job.branches == 0:
            return StepRows(images=num_rows // self._job.branches, branches=self._job.branches, has_lanes=self._job.may_use_lanes)
        return StepRows(images=1, branches=num_rows)

    def _group_fits(self, group: Sequence[SlotFacts], peak_bytes: dict[int, int]) -> bool:
        return self._fits({**{slot.index: slot.fixed_bytes for slot in self._slots}, **peak_bytes}, group)

    def _as_plan(self, chosen: Candidate, single: Candidate | None, reason: str) -> Plan:
        return Plan(
            strategy=chosen.strategy,
            replicas=chosen.replicas,
            reason=reason,
            predicted_ms=chosen.step_ms,
            single_ms=single.step_ms if single is not None else math.inf,
            predicted_bytes=chosen.peak_bytes,
            crossing_bytes=chosen.crossing_bytes,
            lanes=self._job.images if chosen.is_cut and self._job.may_use_lanes else 1,
            component_slots=chosen.component_slots,
            control_slots=chosen.control_slots,
            tiles=chosen.tiles,
            streamed=chosen.streamed,
        )


def _rounded(slot: SlotFacts) -> SlotFacts:
    """The facts rounded, bytes to the safe side, so that small changes between runs find the cut of an earlier search."""
    return replace(
        slot,
        speed=_SPEED_STEP ** round(math.log(slot.speed, _SPEED_STEP)),
        budget_bytes=slot.budget_bytes // _BYTES_STEP * _BYTES_STEP,
        fixed_bytes=-(-slot.fixed_bytes // _BYTES_STEP) * _BYTES_STEP,
    )


def _set_partitions(slots: tuple[SlotFacts, ...]) -> Iterator[tuple[tuple[SlotFacts, ...], ...]]:
    """Every way to put all the slots into groups."""
    if not slots:
        yield ()
        return
    first, rest = slots[0], slots[1:]
    for length in range(len(rest) + 1):
        for neighbors in combinations(rest, length):
            for others in _set_partitions(tuple(slot for slot in rest if slot not in neighbors)):
                yield ((first, *neighbors), *others)
