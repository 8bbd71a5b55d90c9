"""Predicts how long rows take to flow through stages on several slots: a discrete event simulation. Numbers only.

It follows the executor's rules:
- A slot runs one stage of one row at a time. Among the rows that could start first, the one that has been ready longest goes; then the one of
  the earlier step; then the lower image and branch.
- A row moves on when its stage and the transfer after it are done. With asynchronous transfers the slot continues at once.
- A step of an image ends when all its branches have passed all stages and are back. With lanes each image then continues by itself; without
  lanes every image waits for the last one.

Arrays: C candidates (ways to cut), R rows, S stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

WARM_UP_STEPS = 4
"""Steps until the pipeline reaches its steady state."""
MEASURED_STEPS = 6
"""Steps over which the step time is averaged. Even, because cycles of two steps are common."""
MOST_IMAGES = 4
"""More images than this only repeat the same cycle, so the time is scaled up from this many."""
_SAME_TIME = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTime:
    """One stage on a slot, and the transfer to the next stage (from the last: to where the branches are combined)."""

    slot: int
    run_ms: float
    send_ms: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRows:
    """The rows of a step: every image once for every branch."""

    images: int = 1
    branches: int = 2
    has_lanes: bool = True

    def __post_init__(self) -> None:
        if self.images < 1 or self.branches < 1:
            raise ValueError(f"A step of {self.images} images and {self.branches} branches was requested; it needs at least one of each.")

    @property
    def count(self) -> int:
        return self.images * self.branches


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineTime:
    """Time of one step of all images in the steady state, and the share of it that each slot is busy."""

    step_ms: float
    busy_share: dict[int, float]


@dataclass(frozen=True, slots=True)
class StageArrays:
    """Many candidates with the same number of stages. `slot_CS` counts slots from 0; -1 pads a candidate (no time, no slot)."""

    slot_CS: Ints
    run_ms_CS: Floats
    send_ms_CS: Floats

    def take(self, chosen: Ints) -> StageArrays:
        return StageArrays(self.slot_CS[chosen], self.run_ms_CS[chosen], self.send_ms_CS[chosen])


def join_candidates(arrays: Sequence[StageArrays]) -> StageArrays:
    """All candidates in one; those with fewer stages are padded."""
    most = max(one.slot_CS.shape[1] for one in arrays)

    def padded(values_CS: npt.NDArray[Any], fill: float) -> npt.NDArray[Any]:
        return np.pad(values_CS, ((0, 0), (0, most - values_CS.shape[1])), constant_values=fill)

    return StageArrays(
        np.concatenate([padded(one.slot_CS, -1) for one in arrays]),
        np.concatenate([padded(one.run_ms_CS, 0.0) for one in arrays]),
        np.concatenate([padded(one.send_ms_CS, 0.0) for one in arrays]),
    )


def simulate_pipeline(stages: Sequence[StageTime], step_rows: StepRows, *, is_async: bool = True) -> PipelineTime:
    """The time of one placement of stages. Any slot numbers will do."""
    names = list(dict.fromkeys(stage.slot for stage in stages))
    arrays = StageArrays(
        np.array([[names.index(stage.slot) for stage in stages]], dtype=np.int64),
        np.array([[stage.run_ms for stage in stages]], dtype=np.float64),
        np.array([[stage.send_ms for stage in stages]], dtype=np.float64),
    )
    step_ms = float(simulate_many(arrays, step_rows, is_async=is_async)[0])
    busy_ms = {slot: step_rows.count * sum(stage.run_ms for stage in stages if stage.slot == slot) for slot in names}
    return PipelineTime(step_ms=step_ms, busy_share={slot: busy / step_ms if step_ms > 0 else 0.0 for slot, busy in busy_ms.items()})


def simulate_many(arrays: StageArrays, step_rows: StepRows, *, is_async: bool = True) -> Floats:
    """ms per step of every candidate."""
    images = min(step_rows.images, MOST_IMAGES)
    simulation = _Simulation(arrays, StepRows(images=images, branches=step_rows.branches, has_lanes=step_rows.has_lanes), is_async)
    started_C = simulation.run_until(WARM_UP_STEPS)
    ended_C = simulation.run_until(WARM_UP_STEPS + MEASURED_STEPS)
    step_ms_C: Floats = (ended_C - started_C) / MEASURED_STEPS * (step_rows.images / images)
    return step_ms_C


def lower_bounds(arrays: StageArrays, step_rows: StepRows) -> Floats:
    """Lower bound for any schedule: the busiest slot's work, and one row's path through all stages."""
    num_slots = int(arrays.slot_CS.max(initial=0)) + 1
    busy_CS = [np.where(arrays.slot_CS == slot, arrays.run_ms_CS, 0.0).sum(axis=1) for slot in range(num_slots)]
    path_C = (arrays.run_ms_CS + arrays.send_ms_CS).sum(axis=1)
    bounds_C: Floats = np.maximum(np.max(busy_CS, axis=0) * step_rows.count, path_C)
    return bounds_C


class _Simulation:
    """Simulates all candidates at once: every turn starts one stage of one row in each of them."""

    def __init__(self, arrays: StageArrays, step_rows: StepRows, is_async: bool) -> None:
        self._step_rows, self._is_async = step_rows, is_async
        num_candidates, self._num_stages = arrays.slot_CS.shape
        self._candidates_C: Ints = np.arange(num_candidates)
        # Flat arrays (_F) and positions in them: numpy indexes these in a fraction of the time that pairs of indices take.
        self._slot_F, self._run_ms_F, self._send_ms_F = (
            self._with_end(arrays.slot_CS, -1),
            self._with_end(arrays.run_ms_CS),
            self._with_end(arrays.send_ms_CS),
        )
        self._first_stage_C1 = self._candidates_C[:, None] * (self._num_stages + 1)
        # The last column is the slot of padding stages: always free.
        num_free = int(arrays.slot_CS.max(initial=0)) + 2
        self._slot_F[self._slot_F < 0] = num_free - 1
        self._free_ms_F: Floats = np.zeros(num_candidates * num_free)
        self._first_free_C1 = self._candidates_C[:, None] * num_free
        self._has_none = bool((arrays.slot_CS < 0).any())
        self._none_F = self._first_free_C1[:, 0] + num_free - 1
        self._ready_ms_CR: Floats = np.zeros((num_candidates, step_rows.count))
        self._stage_CR: Ints = np.zeros((num_candidates, step_rows.count), dtype=np.int64)
        self._step_CR: Ints = np.zeros((num_candidates, step_rows.count), dtype=np.int64)
        self._done_ms_CR: Floats = np.full((num_candidates, step_rows.count), np.inf)
        self._goal = 0

    @staticmethod
    def _with_end(values_CS: npt.NDArray[Any], fill: float = 0.0) -> npt.NDArray[Any]:
        """Flat, with one more stage after the last, where rows wait for others."""
        return np.pad(values_CS, ((0, 0), (0, 1)), constant_values=fill).reshape(-1)

    def run_until(self, num_steps: int) -> Floats:
        """When each candidate has finished `num_steps` steps of every image. A row that gets there waits, so all candidates take equally many
        turns."""
        self._goal = num_steps
        remaining_CR = np.maximum(0, (num_steps - self._step_CR) * self._num_stages - self._stage_CR)
        waiting_CR = np.isfinite(self._done_ms_CR)
        remaining_CR = np.where(waiting_CR, (num_steps - self._step_CR - 1) * self._num_stages, remaining_CR)
        for _ in range(int(remaining_CR.sum(axis=1).max(initial=0))):
            self._start_one()
        ended_ms_C: Floats = self._ready_ms_CR.max(axis=1)
        return ended_ms_C

    def _start_one(self) -> None:
        candidates_C, first_CR = self._candidates_C, self._first_stage_C1 + self._stage_CR
        slot_CR = self._slot_F.take(first_CR)
        ready_CR = np.where(self._step_CR < self._goal, self._ready_ms_CR, np.inf)
        start_CR = np.maximum(ready_CR, self._free_ms_F.take(self._first_free_C1 + slot_CR))
        row_C = self._choose(start_CR, ready_CR)
        at_C = candidates_C * self._step_rows.count + row_C
        start_C, stage_F = start_CR.take(at_C), first_CR.take(at_C)
        end_C = start_C + self._run_ms_F.take(stage_F)
        arrive_C = end_C + self._send_ms_F.take(stage_F)
        self._free_ms_F[self._first_free_C1[:, 0] + slot_CR.take(at_C)] = end_C if self._is_async else arrive_C
        if self._has_none:
            self._free_ms_F[self._none_F] = 0.0
        stage_C = self._stage_CR.take(at_C) + 1
        self._stage_CR.reshape(-1)[at_C] = stage_C
        self._ready_ms_CR.reshape(-1)[at_C] = arrive_C
        is_through_C = stage_C == self._num_stages
        if is_through_C.any():
            self._end_row(candidates_C[is_through_C], row_C[is_through_C], arrive_C[is_through_C])

    def _choose(self, start_CR: Floats, ready_CR: Floats) -> Ints:
        """The row that starts earliest; ties by how long it has been ready, then by step, then by row number."""
        best_CR = start_CR <= self._least(start_CR) * (1 + _SAME_TIME) + _SAME_TIME
        ready_CR = np.where(best_CR, ready_CR, np.inf)
        best_CR = ready_CR <= self._least(ready_CR) * (1 + _SAME_TIME) + _SAME_TIME
        chosen_C: Ints = np.where(best_CR, self._step_CR, np.iinfo(np.int64).max).argmin(axis=1)
        return chosen_C

    @staticmethod
    def _least(values_CR: Floats) -> Floats:
        """The minimum of each candidate, as a column. Column by column: numpy's own reduction over a short last axis is slow."""
        least_C = values_CR[:, 0]
        for row in range(1, values_CR.shape[1]):
            least_C = np.minimum(least_C, values_CR[:, row])
        return least_C[:, None]

    def _end_row(self, candidates: Ints, row: Ints, arrive_ms: Floats) -> None:
        """A row is back. The step of its group (one image; without lanes all images) ends with the last row of the group."""
        self._done_ms_CR[candidates, row] = arrive_ms
        self._ready_ms_CR[candidates, row] = np.inf
        size = self._step_rows.branches if self._step_rows.has_lanes else self._step_rows.count
        members = (row // size * size)[:, None] + np.arange(size)[None, :]
        done_ms = self._done_ms_CR[candidates[:, None], members].max(axis=1)
        is_over = np.isfinite(done_ms)
        over_candidates, over_members = candidates[is_over][:, None], members[is_over]
        self._ready_ms_CR[over_candidates, over_members] = done_ms[is_over][:, None]
        self._stage_CR[over_candidates, over_members] = 0
        self._step_CR[over_candidates, over_members] += 1
        self._done_ms_CR[over_candidates, over_members] = np.inf
