"""Cuts one copy of a network over slots: which piece runs where. Pure arithmetic over costs; knows no tensors and no devices.

**Which cuts are searched.** The slots, in some order s1 .. sk, form nested rings: s1 runs the outermost pieces at both ends of the network, s2
the next ones, sk the middle. A run may be empty, so straight cuts (empty second halves), the U-cut (two slots) and unused slots are included.

**The objective**, in this order:
1. It fits: every slot's peak bytes are within its budget, and at least as many slots work as requested. If no cut fits, there is no partition.
2. Slots of equal size (`total_bytes`) are within 10 % of each other in peak bytes, if any cut that fits allows it. Then most rules kept, of:
   no slot has more than 65 % of the weights (if two or more slots work); crossing bytes stay below the limit, if there is one.
3. Least time of a step (see pipeline.py). Times within 1 % of the least count as equal: the prediction is no better than that.
4. Fewest crossing bytes, then fewest changes of slot, then least time.

**What is exact.** For two slots, every cut between any two pieces is considered. For more slots, every cut between segments, then cuts between
blocks around the best of those (up to a segment's length to either side, all boundaries, until nothing improves). If a network has fewer than
EXHAUSTIVE_LIMIT cuts, the search is exact at block granularity for any number of slots. With more than MOST_NESTED slots the search is local and
starts from cuts in proportion to speed instead of from all cuts between segments.

**Streaming** (`PartitionJob.may_stream`). A slot without room for its pieces keeps what its budget holds, less STREAM_SLACK and the layers in flight,
and the rest comes from main memory for every row. Copying takes time on the slot, and time decides: balance and shares are no rules here, because
slots that stream are full anyway. Example: 12 GB of pieces, a budget of 11 GB: 10.5 GB stay, 1.5 GB stream.

A slot's peak bytes: its fixed bytes, the weights of its pieces, the time embedding's weights (first slot), the largest working memory of its
pieces, and for every row that may be in flight the skips it keeps, the state at its boundaries and a ControlNet's residuals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, combinations_with_replacement, permutations
from math import comb

import numpy as np
import numpy.typing as npt

from backend.nn.piece import Piece
from backend.parallel.planning.costs import ComponentCost, ModelProfile, merge_pieces
from backend.parallel.planning.pipeline import StageArrays, StepRows, join_candidates, lower_bounds, simulate_many
from backend.parallel.planning.plan import ReplicaPlan, StreamedWeights
from backend.parallel.planning.slot_facts import Link, LinkTable, SlotFacts

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MOST_WEIGHT_SHARE = 0.65
MOST_IMBALANCE = 0.10
STREAM_SLACK = 0.03
"""Share of the budget that a slot that streams leaves to the allocator: it fetches and frees layers of several sizes all the time."""
BALANCE_RANK = 4
"""Rank of the balance rule, which counts more than the two others together."""
SAME_TIME = 0.01
EXHAUSTIVE_LIMIT = 60_000
MOST_NESTED = 4
_COARSE_LIMIT = 100_000
_BATCH = 512
_MORE_BATCH = 2048
_TRIED = 128
_NUM_SEEDS = 6
_NUM_REFINED = 3
_REACH = 10
_MOST_ROUNDS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionJob:
    """What the copy is for.

    `movable` are components without a slot yet. They go where most room is left, largest first. One that runs per row (a ControlNet) runs
    before the UNet on `control_slot`, or if that is None on the copy's slot with the best objective, and its work counts. `least_slots` is how
    many slots must get pieces, if there are that many pieces. `rows_per_forward` is how many rows run at once. `may_stream`: pieces without room
    on their slot may come from main memory.
    """

    step_rows: StepRows = field(default_factory=StepRows)
    rows_per_forward: int = 1
    movable: tuple[ComponentCost, ...] = ()
    control_slot: int | None = None
    max_crossing_bytes: int | None = None
    least_slots: int = 1
    is_async: bool = True
    may_stream: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """The chosen cut and its predicted cost.

    `peak_bytes` is per slot index (including slots without pieces), `crossing_bytes` per step of all rows; `control_bytes` of these are a
    ControlNet's residuals. `rules_kept`: whether the cut keeps every rule of the objective. `imbalance`: the largest gap between the peaks of slots
    of one size, as a share of the higher. `streamed`: by slot, if any slot streams.
    """

    replica: ReplicaPlan
    step_ms: float
    peak_bytes: dict[int, int]
    weight_bytes: dict[int, int]
    crossing_bytes: int
    control_bytes: int
    component_slots: dict[str, int]
    rules_kept: bool
    imbalance: float
    streamed: Mapping[int, StreamedWeights] = field(default_factory=dict)


def partition(profile: ModelProfile, slots: Sequence[SlotFacts], links: Sequence[Link] = (), job: PartitionJob | None = None) -> Partition | None:
    """The best cut over some or all of the slots (see above); None if none fits. `slots[0]` is the primary, which has the latents."""
    return _partition(profile, tuple(slots), tuple(links), job or PartitionJob())


@lru_cache(maxsize=256)
def _partition(profile: ModelProfile, slots: tuple[SlotFacts, ...], links: tuple[Link, ...], job: PartitionJob) -> Partition | None:
    if not slots:
        raise ValueError("A cut over no slots was requested. Give at least one slot.")
    table = LinkTable(links)
    evaluators = [
        _Evaluator(profile, slots, order, table, job, control_position)
        for order in _orders(slots, table)
        for control_position in _control_positions(job, slots)
    ]
    finalists = search(evaluators)
    if not finalists:
        return None
    fewest = min(score.rules_broken for score in finalists)
    best = _pick([score for score in finalists if score.rules_broken == fewest])
    return best.evaluator.describe(best.cuts)


def _orders(slots: tuple[SlotFacts, ...], table: LinkTable) -> list[tuple[int, ...]]:
    """Ways to nest the slots, without orders that differ only in the index of interchangeable slots. The primary (first) slot is never
    interchangeable."""
    kinds = [(position == 0, slot.facts_without_index()) for position, slot in enumerate(slots)]
    seen, orders = set(), []
    for order in permutations(range(len(slots))) if len(slots) <= MOST_NESTED else _long_orders(slots):
        ways = tuple(table.facts(slots[one], slots[other]) for one in order for other in (0, *order))
        signature = (tuple(kinds[position] for position in order), ways)
        if signature not in seen:
            seen.add(signature)
            orders.append(order)
    return orders


def _long_orders(slots: tuple[SlotFacts, ...]) -> list[tuple[int, ...]]:
    """For many slots: in the given order, and by free bytes, ascending and descending."""
    by_room = sorted(range(len(slots)), key=lambda position: (slots[position].free_bytes, -position))
    return [tuple(range(len(slots))), tuple(by_room), tuple(reversed(by_room))]


def _control_positions(job: PartitionJob, slots: tuple[SlotFacts, ...]) -> list[int | None]:
    if not any(component.runs_per_row for component in job.movable):
        return [None]
    return [position for position, slot in enumerate(slots) if job.control_slot in (None, slot.index)]


@dataclass(frozen=True, slots=True)
class _Score:
    """A cut that fits, and its values for the objective."""

    evaluator: _Evaluator
    cuts: Ints
    rules_broken: float
    step_ms: float
    crossing_bytes: float
    num_changes: int


def _pick(scores: Sequence[_Score]) -> _Score:
    """Parts 3 and 4 of the objective."""
    least_ms = min(score.step_ms for score in scores)
    same = [score for score in scores if score.step_ms <= least_ms * (1 + SAME_TIME)]
    return min(same, key=lambda score: (score.crossing_bytes, score.num_changes, score.step_ms))


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Everything about many cuts except their time."""

    stages: StageArrays
    peak_CK: Floats
    weight_CK: Floats
    crossing_C: Floats
    changes_C: Ints
    excess_C: Floats
    broken_C: Floats
    breach_C: Floats
    places: tuple[Ints, ...]
    streamed_CK: Floats
    fetched_CK: Floats
    """Bytes that stream for every row, and bytes of the layers that are on the slot while they compute."""


class _Evaluator:
    """Costs of cuts for one order of slots. A cut is the 2k-2 inner boundaries of the 2k-1 runs, in non-decreasing order."""

    def __init__(
        self,
        profile: ModelProfile,
        slots: tuple[SlotFacts, ...],
        order: tuple[int, ...],
        links: LinkTable,
        job: PartitionJob,
        control_position: int | None,
    ) -> None:
        self.profile, self.slots, self.order, self.job, self.control_position = profile, slots, order, job, control_position
        self.num_pieces = len(profile.pieces)
        count = len(order)
        self.run_slots = [order[run] if run < count else order[2 * count - 2 - run] for run in range(2 * count - 1)]
        self.num_cuts = 2 * count - 2
        self._control_networks = tuple(component for component in job.movable if component.runs_per_row)
        others = [component for component in job.movable if not component.runs_per_row]
        self._others = tuple(sorted(others, key=lambda component: -component.weight_bytes))
        self._make_sums()
        self._make_links(links)

    def _make_sums(self) -> None:
        pieces = self.profile.pieces
        self._work = _prefix([cost.work_per_row for cost in pieces])
        self._weights = _prefix([cost.weight_bytes for cost in pieces])
        self._kernels = _prefix([cost.num_kernels for cost in pieces])
        self._state = np.array([0.0, *(cost.hidden_bytes_per_row + cost.residual_bytes_per_row for cost in pieces)])
        self._pushed = np.array([0.0, *(cost.skip_bytes_per_row for cost in pieces)])
        working = np.array([cost.working_bytes_per_row for cost in pieces], dtype=np.float64)
        self._largest = _maxima(working)
        self._largest_layer = _maxima(np.array([cost.largest_layer_bytes or cost.weight_bytes for cost in pieces], dtype=np.float64))

    def _make_links(self, links: LinkTable) -> None:
        self._ms_per_byte = np.array([[links.ms_per_byte(source, target) for target in self.slots] for source in self.slots])
        self._latency_ms = np.array([[links.latency_ms(source, target) for target in self.slots] for source in self.slots])
        self._crosses = np.array([[links.crosses(source, target) for target in self.slots] for source in self.slots])

    def measure(self, cuts_CB: Ints) -> _Numbers:
        """All numbers of many cuts except their time."""
        num_cuts, num_slots = len(cuts_CB), len(self.slots)
        edges = np.concatenate([np.zeros((num_cuts, 1), np.int64), cuts_CB, np.full((num_cuts, 1), self.num_pieces)], axis=1)
        peak = np.tile(np.array([slot.fixed_bytes for slot in self.slots], dtype=np.float64), (num_cuts, 1))
        weight, working, layer = (np.zeros((num_cuts, num_slots)) for _ in range(3))
        for run, slot in enumerate(self.run_slots):
            first, end = edges[:, run], edges[:, run + 1]
            weight[:, slot] += self._weights[end] - self._weights[first]
            working[:, slot] = np.maximum(working[:, slot], self._largest[first, end])
            layer[:, slot] = np.maximum(layer[:, slot], self._largest_layer[first, end])
        weight[np.arange(num_cuts), self._slot_of(edges, 0)] += self.profile.embedding_bytes
        stages, crossing, changes, kept = self._make_stages(edges)
        skip_crossing, skip_kept, skip_ms = self._follow_skips(edges)
        self._delay_by_skips(stages, skip_ms)
        crossing, kept = crossing + skip_crossing, kept + skip_kept
        is_used = weight > 0
        control, control_ms = self._control_crossing(edges)
        if self.control_position is not None:
            stages.send_ms_CS[:, 0] += control_ms
        crossing = crossing + control + self._shared_crossing(edges, is_used)
        peak += weight + working * self.job.rows_per_forward + kept * self.job.step_rows.count
        places = self._add_components(peak, edges)
        budgets = np.array([slot.budget_bytes for slot in self.slots], dtype=np.float64)
        excess_CK = np.maximum(0.0, np.where(is_used, peak - budgets, 0.0))
        streamed, fetched = self._stream(excess_CK, weight, layer)
        peak += fetched - streamed
        self._delay_by_streaming(stages, streamed)
        excess = np.where(streamed > 0, np.maximum(0.0, peak - budgets), excess_CK).sum(axis=1)
        missing = np.maximum(0, min(self.job.least_slots, self.num_pieces) - is_used.sum(axis=1))
        excess += missing * float(budgets.max())
        crossing = crossing * self.job.step_rows.count
        broken, breach = self._rules(peak, weight, is_used, crossing)
        return _Numbers(stages, peak, weight, crossing, changes, excess, broken, breach, places, streamed, fetched)

    def _stream(self, excess_CK: Floats, weight_CK: Floats, layer_CK: Floats) -> tuple[Floats, Floats]:
        """Bytes of each slot's pieces that stream for every row, and bytes of the layers in flight. Zero if the job may not stream."""
        if not self.job.may_stream:
            return np.zeros_like(weight_CK), np.zeros_like(weight_CK)
        does_stream_CK = (excess_CK > 0) & np.array([slot.may_stream for slot in self.slots])
        fetched_CK = np.where(does_stream_CK, layer_CK * np.array([slot.layers_in_flight for slot in self.slots]), 0.0)
        slack_K = STREAM_SLACK * np.array([max(0, slot.free_bytes) for slot in self.slots], dtype=np.float64)
        streamed_CK = np.where(does_stream_CK, np.minimum(weight_CK, excess_CK + fetched_CK + slack_K), 0.0)
        return streamed_CK, fetched_CK

    def _delay_by_streaming(self, stages: StageArrays, streamed_CK: Floats) -> None:
        """Charge fetching to each slot's first stage."""
        rows = np.arange(len(streamed_CK))
        for position, slot in enumerate(self.slots):
            if streamed_CK[:, position].any():
                compute_ms = np.where(stages.slot_CS == position, stages.run_ms_CS, 0.0).sum(axis=1)
                first = (stages.slot_CS == position).argmax(axis=1)
                stages.run_ms_CS[rows, first] += np.where(streamed_CK[:, position] > 0, slot.fetch_ms(streamed_CK[:, position], compute_ms), 0.0)

    def _slot_of(self, edges: Ints, piece: int) -> Ints:
        """Position of the slot that runs the piece."""
        run_C = (edges[:, 1:-1] <= piece).sum(axis=1)
        position_C: Ints = np.array(self.run_slots, dtype=np.int64)[run_C]
        return position_C

    def _make_stages(self, edges: Ints) -> tuple[StageArrays, Floats, Ints, Floats]:
        """Stages without empty runs, adjacent runs on one slot joined; bytes that cross the boundaries, changes of slot, bytes kept there."""
        num_cuts, num_runs = len(edges), len(self.run_slots)
        rows = np.arange(num_cuts)
        slot_CS = np.full((num_cuts, num_runs + 2), -1, dtype=np.int64)
        run_ms, send_ms = np.zeros((num_cuts, num_runs + 2)), np.zeros((num_cuts, num_runs + 2))
        crossing, changes, kept = np.zeros(num_cuts), np.zeros(num_cuts, np.int64), np.zeros((num_cuts, len(self.slots)))
        at = np.full(num_cuts, -1, dtype=np.int64)
        if self.control_position is not None:
            slot_CS[:, 0], at[:] = self.control_position, 0
            run_ms[:, 0] = sum(self.slots[self.control_position].forward_ms(component.flops_per_row, component.weight_bytes, component.num_kernels)
                               for component in self._control_networks)  # fmt: skip
        previous = np.full(num_cuts, 0, dtype=np.int64)  # the latents are on the first slot
        for run, slot in enumerate(self.run_slots):
            first, end = edges[:, run], edges[:, run + 1]
            is_run = end > first
            is_new = is_run & ((at < 0) | (slot_CS[rows, np.maximum(at, 0)] != slot))
            state = np.where(first > 0, self._state[first], float(self.profile.latent_bytes_per_row))
            moves = is_run & (previous != slot)
            self._send(send_ms, rows, at, previous, slot, state, moves)
            crosses = moves & self._crosses[previous, slot]
            crossing += np.where(crosses, state, 0.0)
            changes += moves & (first > 0)
            kept[:, slot] += np.where(moves, state, 0.0)
            at = at + is_new
            slot_CS[rows[is_run], at[is_run]] = slot
            ms = self.slots[slot].forward_ms(self._work[end] - self._work[first], self._weights[end] - self._weights[first],
                                             self._kernels[end] - self._kernels[first])  # fmt: skip
            run_ms[rows[is_run], at[is_run]] += np.asarray(ms)[is_run]
            previous = np.where(is_run, slot, previous)
        back = np.full(num_cuts, float(self.profile.output_bytes_per_row))
        self._send(send_ms, rows, at, previous, 0, back, previous != 0)
        crossing += np.where(self._crosses[previous, 0], back, 0.0)
        most = int(at.max()) + 1
        return StageArrays(slot_CS[:, :most], run_ms[:, :most], send_ms[:, :most]), crossing, changes, kept

    def _send(self, send_ms: Floats, rows: Ints, at: Ints, source: Ints, target: int, num_bytes: Floats, moves: Bools) -> None:
        ms = self._latency_ms[source, target] + num_bytes * self._ms_per_byte[source, target]
        where = moves & (at >= 0)
        send_ms[rows[where], at[where]] += ms[where]

    def _follow_skips(self, edges: Ints) -> tuple[Floats, Floats, Floats]:
        """Bytes of skips that cross, bytes that wait on each slot, and sending time in ms per sending slot.

        A skip that is also the state at a boundary, and goes to the same slot, is sent once.
        """
        crossing, kept, send_ms = np.zeros(len(edges)), np.zeros((len(edges), len(self.slots))), np.zeros((len(edges), len(self.slots)))
        rows = np.arange(len(edges))
        for index, cost in enumerate(self.profile.pieces):
            for taken in cost.takes:
                num_bytes = taken.bytes_per_row
                source, target = self._slot_of(edges, taken.source), self._slot_of(edges, index)
                following = self._slot_of(edges, min(taken.source + 1, self.num_pieces - 1))
                is_sent = self._crosses[source, target] & (following != target)
                crossing += np.where(is_sent, num_bytes, 0)
                send_ms[rows, source] += np.where(is_sent, num_bytes * self._ms_per_byte[source, target], 0.0)
                kept[rows, target] += num_bytes
        return crossing, kept, send_ms

    def _delay_by_skips(self, stages: StageArrays, skip_ms: Floats) -> None:
        """Skips are sent while the slot keeps computing. Sending that takes longer than its first stage delays the state sent after it."""
        rows = np.arange(len(skip_ms))
        for slot in range(len(self.slots)):
            first = (stages.slot_CS == slot).argmax(axis=1)
            stages.send_ms_CS[rows, first] += np.maximum(0.0, skip_ms[:, slot] - stages.run_ms_CS[rows, first])

    def _shared_crossing(self, edges: Ints, is_used: Bools) -> Floats:
        """The context goes to the first slot, and from there with the time embedding to every other slot."""
        first = self._slot_of(edges, 0)
        crossing: Floats = np.where(self._crosses[0, first], self.profile.context_bytes_per_row, 0.0)
        for slot in range(len(self.slots)):
            goes = is_used[:, slot] & self._crosses[first, slot]
            crossing = crossing + np.where(goes, self.profile.context_bytes_per_row + self.profile.emb_bytes_per_row, 0.0)
        return crossing

    def _control_crossing(self, edges: Ints) -> tuple[Floats, Floats]:
        """Bytes of residuals that cross, and the time to send them, assuming none of it overlaps with computation."""
        crossing, send_ms = np.zeros(len(edges)), np.zeros(len(edges))
        if self.control_position is None:
            return crossing, send_ms
        for index, cost in enumerate(self.profile.pieces):
            if cost.control_bytes_per_row:
                target = self._slot_of(edges, index)
                crossing += np.where(self._crosses[self.control_position, target], cost.control_bytes_per_row, 0)
                send_ms += cost.control_bytes_per_row * self._ms_per_byte[self.control_position, target]
        return crossing, send_ms

    def _add_components(self, peak: Floats, edges: Ints) -> tuple[Ints, ...]:
        """Charge the movable components. Returns, for each that does not run per row, its slot's position per cut."""
        if self.control_position is not None:
            self._add_control_networks(peak, edges, self.control_position)
        budgets = np.array([slot.budget_bytes for slot in self.slots], dtype=np.float64)
        places = []
        for component in self._others:
            place_C: Ints = (budgets - peak).argmax(axis=1)
            peak[np.arange(len(edges)), place_C] += component.weight_bytes
            places.append(place_C)
        return tuple(places)

    def _add_control_networks(self, peak: Floats, edges: Ints, control_position: int) -> None:
        """Charge a ControlNet's weights and working memory, all residuals where they are made, and a copy of each that is added elsewhere."""
        for component in self._control_networks:
            peak[:, control_position] += component.weight_bytes + component.working_bytes_per_row * self.job.rows_per_forward
        for index, cost in enumerate(self.profile.pieces):
            if cost.control_bytes_per_row:
                num_bytes, target = cost.control_bytes_per_row * self.job.step_rows.count, self._slot_of(edges, index)
                peak[:, control_position] += num_bytes
                peak[np.arange(len(edges)), target] += np.where(target == control_position, 0.0, num_bytes)

    def _rules(self, peak: Floats, weight: Floats, is_used: Bools, crossing: Floats) -> tuple[Floats, Floats]:
        """How many rules each cut breaks, and by how much in total."""
        over = np.full(len(peak), -1.0) if self.job.max_crossing_bytes is None else crossing / max(1, self.job.max_crossing_bytes) - 1.0
        if self.job.may_stream:
            return (over > 0).astype(np.float64), np.maximum(over, 0.0)
        is_alone = is_used.sum(axis=1) < 2
        share = np.where(is_alone, 0.0, weight.max(axis=1) / max(1, self.profile.weight_bytes) - MOST_WEIGHT_SHARE)
        parts = [share, self._imbalance(peak) - MOST_IMBALANCE, over]
        broken = sum((part > 0).astype(np.float64) * rank for part, rank in zip(parts, (1, BALANCE_RANK, 1)))
        breach = sum(np.maximum(part, 0.0) for part in parts)
        return np.asarray(broken), np.asarray(breach)

    def _imbalance(self, peak: Floats) -> Floats:
        """The largest gap between slots of one size, as a share of the higher peak; 0 if no two have the same size."""
        imbalance = np.zeros(len(peak))
        for size in {slot.total_bytes for slot in self.slots}:
            alike = np.array([slot.total_bytes == size for slot in self.slots])
            most = np.where(alike, peak, 0.0).max(axis=1)
            least = np.where(alike, peak, np.inf).min(axis=1)
            imbalance = np.maximum(imbalance, (most - least) / np.maximum(most, 1.0))
        return imbalance

    def work_between(self, first: int, end: int) -> float:
        return float(self._work[end] - self._work[first])

    def cuts_of_shares(self, shares: Sequence[float]) -> Ints:
        """Boundaries that divide the work among the runs in these proportions."""
        goals = np.cumsum(np.asarray(shares, dtype=np.float64))[:-1] / sum(shares) * self._work[-1]
        return np.maximum.accumulate(np.searchsorted(self._work, goals).clip(0, self.num_pieces)).astype(np.int64)

    def step_ms(self, numbers: _Numbers, chosen: Ints) -> Floats:
        return simulate_many(numbers.stages.take(chosen), self.job.step_rows, is_async=self.job.is_async)

    def score(self, numbers: _Numbers, cuts_CB: Ints, index: int, step_ms: float) -> _Score:
        broken, crossing = float(numbers.broken_C[index]), float(numbers.crossing_C[index])
        return _Score(self, cuts_CB[index], broken, step_ms, crossing, int(numbers.changes_C[index]))

    def describe(self, cuts: Ints) -> Partition:
        cuts_CB = cuts[None, :]
        numbers = self.measure(cuts_CB)
        edges = np.concatenate([np.zeros((1, 1), np.int64), cuts_CB, np.full((1, 1), self.num_pieces)], axis=1)
        pieces: list[Piece] = []
        slots: list[int] = []
        for run, position in enumerate(self.run_slots):
            merged = merge_pieces([cost.piece for cost in self.profile.pieces[int(edges[0, run]) : int(edges[0, run + 1])]])
            if merged and pieces and slots[-1] == self.slots[position].index:
                joined = merge_pieces([pieces[-1], *merged])
                pieces, slots = pieces[:-1], slots[:-1]
                merged = joined
            pieces += merged
            slots += [self.slots[position].index] * len(merged)
        components = (
            {component.name: self.slots[self.control_position].index for component in self._control_networks}
            if self.control_position is not None
            else {}
        )
        components |= {component.name: self.slots[int(place[0])].index for component, place in zip(self._others, numbers.places)}
        return Partition(
            replica=ReplicaPlan(pieces=tuple(pieces), slots=tuple(slots)),
            step_ms=float(self.step_ms(numbers, np.zeros(1, np.int64))[0]),
            peak_bytes={slot.index: int(numbers.peak_CK[0, position]) for position, slot in enumerate(self.slots)},
            weight_bytes={slot.index: int(numbers.weight_CK[0, position]) for position, slot in enumerate(self.slots)},
            crossing_bytes=int(numbers.crossing_C[0]),
            control_bytes=int(self._control_crossing(edges)[0][0]) * self.job.step_rows.count,
            component_slots=components,
            rules_kept=bool(numbers.broken_C[0] == 0),
            imbalance=float(self._imbalance(numbers.peak_CK)[0]),
            streamed=self._describe_streamed(numbers),
        )

    def _describe_streamed(self, numbers: _Numbers) -> dict[int, StreamedWeights]:
        if not numbers.streamed_CK.any():
            return {}
        rooms = numbers.weight_CK[0] - numbers.streamed_CK[0] + numbers.fetched_CK[0]
        return {
            slot.index: StreamedWeights(budget_bytes=int(rooms[position]), streamed_bytes=int(numbers.streamed_CK[0, position]))
            for position, slot in enumerate(self.slots)
            if numbers.weight_CK[0, position] > 0
        }


def _maxima(values: Floats) -> Floats:
    """[first, end]: the largest of values[first:end]; 0 if there are none."""
    maxima = np.zeros((len(values) + 1, len(values) + 1))
    for first in range(len(values)):
        maxima[first, first + 1 :] = np.maximum.accumulate(values[first:])
    return maxima


def _prefix(values: Sequence[float]) -> Floats:
    return np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])


# the search


def search(evaluators: Sequence[_Evaluator]) -> list[_Score]:
    """Among all orders of slots, the cuts that fit, keep the most rules and are within SAME_TIME of the fastest of these. Empty if none fits."""
    first = evaluators[0]
    if _count_cuts(first.num_pieces + 1, first.num_cuts) <= EXHAUSTIVE_LIMIT:
        cuts_CB = _all_cuts(tuple(range(first.num_pieces + 1)), first.num_cuts)
        return _finalists([(evaluator, cuts_CB) for evaluator in evaluators])
    starts = sorted((_best_start(evaluator, _COARSE_LIMIT // len(evaluators)) for evaluator in evaluators), key=lambda start: start.rank)
    return _finalists([(start.evaluator, _refine(start.evaluator, start.seeds)) for start in starts[:_NUM_REFINED]])


@dataclass(frozen=True, slots=True)
class _Start:
    """Where the refinement for one order of slots begins."""

    evaluator: _Evaluator
    seeds: Ints
    rank: tuple[float, ...]


def _best_start(evaluator: _Evaluator, limit: int) -> _Start:
    cuts_CB = _coarse_cuts(evaluator, limit)
    best, rank = _best_first(evaluator, cuts_CB)
    return _Start(evaluator, cuts_CB[best[:_NUM_SEEDS]], rank)


def _count_cuts(num_positions: int, num_cuts: int) -> int:
    return comb(num_positions + num_cuts - 1, num_cuts)


@lru_cache(maxsize=8)
def _all_cuts(positions: tuple[int, ...], num_cuts: int) -> Ints:
    """Every non-decreasing choice of boundaries."""
    if num_cuts == 0:
        return np.zeros((1, 0), dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(combinations_with_replacement(positions, num_cuts)), dtype=np.int64)
    return flat.reshape(-1, num_cuts)


def _coarse_cuts(evaluator: _Evaluator, limit: int) -> Ints:
    """Cuts between segments, merging segments until there are at most `limit` cuts. For more than MOST_NESTED slots, cuts in proportion to
    speed."""
    pieces = evaluator.profile.pieces
    positions = [0, *(index for index, cost in enumerate(pieces) if index and cost.piece.first_block == 0), len(pieces)]
    if len(evaluator.slots) > MOST_NESTED:
        return _proportional_cuts(evaluator)
    while _count_cuts(len(positions), evaluator.num_cuts) > limit:
        gaps = [evaluator.work_between(positions[at - 1], positions[at + 1]) for at in range(1, len(positions) - 1)]
        del positions[1 + gaps.index(min(gaps))]
    return _all_cuts(tuple(positions), evaluator.num_cuts)


def _proportional_cuts(evaluator: _Evaluator) -> Ints:
    """A straight and a nested cut whose runs have work in proportion to speed."""
    speeds = [evaluator.slots[position].speed for position in evaluator.order]
    runs = [evaluator.slots[position].speed / 2 for position in evaluator.run_slots]
    runs[len(speeds) - 1] *= 2
    straight = [*speeds, *([0.0] * (len(speeds) - 1))]
    return np.stack([evaluator.cuts_of_shares(straight), evaluator.cuts_of_shares(runs)])


@dataclass(frozen=True, slots=True)
class _Pool:
    """The cuts for one order of slots that fit and keep the most rules."""

    evaluator: _Evaluator
    cuts_CB: Ints
    numbers: _Numbers
    kept: Ints

    @property
    def rules_broken(self) -> float:
        return float(self.numbers.broken_C[self.kept[0]])


def _make_pool(evaluator: _Evaluator, cuts_CB: Ints) -> _Pool | None:
    numbers = evaluator.measure(cuts_CB)
    fits = np.flatnonzero(numbers.excess_C <= 0)
    return _Pool(evaluator, cuts_CB, numbers, fits[numbers.broken_C[fits] == numbers.broken_C[fits].min()]) if len(fits) else None


def _finalists(candidates: Sequence[tuple[_Evaluator, Ints]]) -> list[_Score]:
    """Times all orders together, so that the fastest cut of one saves simulating slower cuts of the others."""
    pools = [pool for evaluator, cuts_CB in candidates if (pool := _make_pool(evaluator, cuts_CB)) is not None]
    fewest = min((pool.rules_broken for pool in pools), default=0.0)
    pools = [pool for pool in pools if pool.rules_broken == fewest]
    if not pools:
        return []
    job = pools[0].evaluator.job
    stages = join_candidates([pool.numbers.stages.take(pool.kept) for pool in pools])
    step_ms_C = _fastest_ms(stages, job)
    chosen = step_ms_C <= step_ms_C.min() * (1 + SAME_TIME)
    ends = np.cumsum([len(pool.kept) for pool in pools])
    parts = zip(pools, np.split(chosen, ends[:-1]), np.split(step_ms_C, ends[:-1]))
    return [
        pool.evaluator.score(pool.numbers, pool.cuts_CB, int(pool.kept[at]), float(step_ms[at]))
        for pool, is_chosen, step_ms in parts
        for at in np.flatnonzero(is_chosen)
    ]


def _fastest_ms(stages: StageArrays, job: PartitionJob) -> Floats:
    """Times of the candidates that may be the fastest; infinity for those whose lower bound rules them out."""
    bounds_C = lower_bounds(stages, job.step_rows)
    order = np.argsort(bounds_C, kind="stable")
    step_ms_C, least_ms, start = np.full(len(order), np.inf), np.inf, 0
    while start < len(order) and bounds_C[order[start]] <= least_ms * (1 + SAME_TIME):
        batch = order[start : start + (_MORE_BATCH if start else _BATCH)]
        batch = batch[bounds_C[batch] <= least_ms * (1 + SAME_TIME)]
        step_ms_C[batch] = simulate_many(stages.take(batch), job.step_rows, is_async=job.is_async)
        least_ms = min(least_ms, float(step_ms_C[batch].min()))
        start += len(batch)
    return step_ms_C


def _refine(evaluator: _Evaluator, seeds: Ints) -> Ints:
    """All cuts visited on the way from the seeds to cuts that no shift of one or two boundaries improves."""
    met = [seeds]
    for _ in range(_MOST_ROUNDS):
        around = np.unique(np.concatenate([_neighbors(cuts, evaluator.num_pieces) for cuts in seeds]), axis=0)
        met.append(around)
        better = around[_best_first(evaluator, around)[0][:_NUM_SEEDS]]
        if np.array_equal(better, seeds):
            break
        seeds = better
    return np.unique(np.concatenate(met), axis=0)


def _best_first(evaluator: _Evaluator, cuts_CB: Ints) -> tuple[Ints, tuple[float, ...]]:
    """Positions of the best cuts, and the rank of the first. Order: fits, then fewest rules broken, then broken by least, then fastest."""
    numbers = evaluator.measure(cuts_CB)
    bounds = lower_bounds(numbers.stages, evaluator.job.step_rows)
    rough = np.lexsort((bounds, numbers.breach_C, numbers.broken_C, numbers.excess_C))[:_TRIED]
    step_ms = evaluator.step_ms(numbers, rough)
    fine = np.lexsort((step_ms, numbers.breach_C[rough], numbers.broken_C[rough], numbers.excess_C[rough]))
    best: Ints = rough[fine]
    at = best[0]
    return best, (float(numbers.excess_C[at]), float(numbers.broken_C[at]), float(numbers.breach_C[at]), float(step_ms[fine[0]]))


def _neighbors(cuts: Ints, num_pieces: int) -> Ints:
    """The cuts, and the cuts with one boundary shifted by up to _REACH or two boundaries by a few fixed lengths."""
    count = len(cuts)
    shifts = [np.zeros(count, dtype=np.int64)]
    steps = [step for step in range(-_REACH, _REACH + 1) if step]
    is_long = count > 2 * MOST_NESTED - 2
    pair_steps = (-2, -1, 1, 2) if is_long else (-4, -2, -1, 1, 2, 4)
    for at in range(count):
        shifts += [_unit_vector(count, at) * step for step in steps]
        mates = [other for other in (at - 1, count - 1 - at) if 0 <= other < at] if is_long else range(at)
        shifts += [_unit_vector(count, at) * one + _unit_vector(count, other) * two for other in mates for one in pair_steps for two in pair_steps]
    moved: Ints = np.clip(cuts[None, :] + np.stack(shifts), 0, num_pieces)
    return moved[(np.diff(moved, axis=1) >= 0).all(axis=1)]


def _unit_vector(count: int, at: int) -> Ints:
    vector = np.zeros(count, dtype=np.int64)
    vector[at] = 1
    return vector
