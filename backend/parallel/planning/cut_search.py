"""Searches for the cut with the least time among those that fit and keep the most rules; `partition` says which cuts are looked at.

Shapes: C cuts, B boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations_with_replacement
from math import comb

import numpy as np

from backend.parallel.planning.cut_costs import CutEvaluator, CutNumbers, CutScore, Floats, Ints, PartitionJob
from backend.parallel.planning.pipeline import StageArrays, join_candidates, lower_bounds, simulate_many

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


def pick(scores: Sequence[CutScore]) -> CutScore:
    """Parts 3 and 4 of the objective."""
    least_ms = min(score.step_ms for score in scores)
    same = [score for score in scores if score.step_ms <= least_ms * (1 + SAME_TIME)]
    return min(same, key=lambda score: (score.crossing_bytes, score.num_changes, score.step_ms))


def search(evaluators: Sequence[CutEvaluator]) -> list[CutScore]:
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

    evaluator: CutEvaluator
    seeds: Ints
    rank: tuple[float, ...]


def _best_start(evaluator: CutEvaluator, limit: int) -> _Start:
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


def _coarse_cuts(evaluator: CutEvaluator, limit: int) -> Ints:
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


def _proportional_cuts(evaluator: CutEvaluator) -> Ints:
    """A straight and a nested cut whose runs have work in proportion to speed."""
    speeds = [evaluator.slots[position].speed for position in evaluator.order]
    runs = [evaluator.slots[position].speed / 2 for position in evaluator.run_slots]
    runs[len(speeds) - 1] *= 2
    straight = [*speeds, *([0.0] * (len(speeds) - 1))]
    return np.stack([evaluator.cuts_of_shares(straight), evaluator.cuts_of_shares(runs)])


@dataclass(frozen=True, slots=True)
class _Pool:
    """The cuts for one order of slots that fit and keep the most rules."""

    evaluator: CutEvaluator
    cuts_CB: Ints
    numbers: CutNumbers
    kept: Ints

    @property
    def rules_broken(self) -> float:
        return float(self.numbers.broken_C[self.kept[0]])


def _make_pool(evaluator: CutEvaluator, cuts_CB: Ints) -> _Pool | None:
    numbers = evaluator.measure(cuts_CB)
    fits = np.flatnonzero(numbers.excess_C <= 0)
    return _Pool(evaluator, cuts_CB, numbers, fits[numbers.broken_C[fits] == numbers.broken_C[fits].min()]) if len(fits) else None


def _finalists(candidates: Sequence[tuple[CutEvaluator, Ints]]) -> list[CutScore]:
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


def _refine(evaluator: CutEvaluator, seeds: Ints) -> Ints:
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


def _best_first(evaluator: CutEvaluator, cuts_CB: Ints) -> tuple[Ints, tuple[float, ...]]:
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
