"""What cuts of a network over slots cost: peak and streamed bytes per slot, bytes that cross, times of stages, rules broken. Many cuts at once.

**Streaming** (`PartitionJob.may_stream`). A slot without room for its pieces keeps what its budget holds, less STREAM_SLACK and the layers in flight,
and the rest comes from main memory for every row. Copying takes time on the slot, and time decides: balance and shares are no rules here, because
slots that stream are full anyway. Example: 12 GB of pieces, a budget of 11 GB: 10.5 GB stay, 1.5 GB stream.

A slot's peak bytes: its fixed bytes, the weights of its pieces, the time embedding's weights (first slot), the largest working memory of its
pieces, and for every row that may be in flight the skips it keeps, the state at its boundaries and a ControlNet's residuals.

Shapes: C cuts, B boundaries, K slots, S stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from backend.nn.piece import Piece
from backend.parallel.planning.costs import ComponentCost, ModelProfile, merge_pieces
from backend.parallel.planning.pipeline import StageArrays, StepRows, simulate_many
from backend.parallel.planning.plan import ReplicaPlan, StreamedWeights
from backend.parallel.planning.slot_facts import LinkTable, SlotFacts

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MOST_WEIGHT_SHARE = 0.65
MOST_IMBALANCE = 0.10
STREAM_SLACK = 0.03
"""Share of the budget that a slot that streams leaves to the allocator: it fetches and frees layers of several sizes all the time."""
BALANCE_RANK = 4
"""Rank of the balance rule, which counts more than the two others together."""


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


@dataclass(frozen=True, slots=True)
class CutScore:
    """A cut that fits, and its values for the objective."""

    evaluator: CutEvaluator
    cuts: Ints
    rules_broken: float
    step_ms: float
    crossing_bytes: float
    num_changes: int


@dataclass(frozen=True, slots=True)
class CutNumbers:
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


class CutEvaluator:
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

    def measure(self, cuts_CB: Ints) -> CutNumbers:
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
        return CutNumbers(stages, peak, weight, crossing, changes, excess, broken, breach, places, streamed, fetched)

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

    def step_ms(self, numbers: CutNumbers, chosen: Ints) -> Floats:
        return simulate_many(numbers.stages.take(chosen), self.job.step_rows, is_async=self.job.is_async)

    def score(self, numbers: CutNumbers, cuts_CB: Ints, index: int, step_ms: float) -> CutScore:
        broken, crossing = float(numbers.broken_C[index]), float(numbers.crossing_C[index])
        return CutScore(self, cuts_CB[index], broken, step_ms, crossing, int(numbers.changes_C[index]))

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

    def _describe_streamed(self, numbers: CutNumbers) -> dict[int, StreamedWeights]:
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
