"""Why a plan was chosen, and why one that was requested was not, in a line that users read. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from backend.parallel.planning.candidate import LEAST_GAIN, Candidate, JobShape, deal_by_speed
from backend.parallel.planning.costs import ModelProfile
from backend.parallel.planning.cut_costs import MOST_IMBALANCE
from backend.parallel.planning.slot_facts import SlotFacts

_GB = 1e9


@dataclass(frozen=True, slots=True)
class PlanReasons:
    """Of plans for one request. `streaming_single`: the plan that streams to one slot, which others are compared with."""

    profile: ModelProfile
    slots: tuple[SlotFacts, ...]
    job: JobShape
    streaming_single: Callable[[], Candidate]

    def describe(self, chosen: Candidate, single: Candidate | None) -> str:
        if chosen.streamed:
            return self._streaming_text(chosen)
        if chosen.is_single and not chosen.shared_control_slots:
            return f"slot {chosen.slot_indexes[0]} alone: {chosen.step_ms:.3g} ms predicted a step"
        if chosen.is_single:
            what = f"the {self.profile.name} on slot {chosen.slot_indexes[0]}"
        elif chosen.is_replicated:
            what = f"{len(chosen.groups)} replicas on {_slots_text(chosen.slot_indexes)}, {self._sharing_text(chosen)}"
        elif chosen.is_tiled:
            what = self._tiles_text(chosen)
        elif chosen.is_one_cut:
            what = f"layers of one copy over {_slots_text(chosen.slot_indexes)}, {self._shares_text(chosen)}"
        else:
            what = f"{len(chosen.groups)} copies on {' / '.join(_slots_text(group) for group in chosen.groups)}, {self._sharing_text(chosen)}"
        what += "".join(f", {name} on slot {slot}" for name, slot in chosen.shared_control_slots.items())
        if chosen.imbalance > MOST_IMBALANCE:
            what += f" ({chosen.imbalance:.0%} apart: of the cuts that fit, none keeps equal slots within {MOST_IMBALANCE:.0%} of each other)"
        if single is None:
            return f"{what}, as the {self.profile.name} fits no single slot: {chosen.step_ms:.3g} ms predicted a step"
        return f"{what}: {single.step_ms / chosen.step_ms:.2f}x predicted of {_slots_text(single.slot_indexes)} alone"

    def _tiles_text(self, chosen: Candidate) -> str:
        teams = [f"{_slots_text(team.slots)} ({':'.join(map(str, team.rows))})" for team in chosen.tiles]
        displaced = 1.0 - self.job.exact_share
        how = f", displaced in {displaced:.0%} of the steps" if displaced else ""
        return f"each row in tiles on {' / '.join(teams)}{how}" + (f", {self._sharing_text(chosen)}" if len(teams) > 1 else "")

    def _streaming_text(self, chosen: Candidate) -> str:
        """ "layers of one copy over slots 0 and 1, 0.9 GB and 1.1 GB of whose weights stream ..." """
        need_bytes = self.profile.weight_bytes + self.profile.working_bytes_per_row() + sum(one.weight_bytes for one in self.job.control_networks)
        why = f"the {self.profile.name} needs {_gb(need_bytes)} and fits neither one slot nor all of them together"
        if chosen.is_single:
            (slot,) = chosen.slot_indexes
            room = _gb(max(0, next(one for one in self.slots if one.index == slot).free_bytes))
            streams = _gb(chosen.streamed[slot].streamed_bytes)
            return f"{why}; slot {slot} has room for {room}, so {streams} of the weights stream to it: {chosen.step_ms:.3g} ms predicted a step"
        amounts = {index: one.streamed_bytes for index, one in sorted(chosen.streamed.items()) if one.streamed_bytes}
        streams = " and ".join(f"{_gb(num_bytes)} to slot {index}" for index, num_bytes in amounts.items())
        alone = self.streaming_single()
        return (
            f"layers of one copy over {_slots_text(chosen.slot_indexes)}, of whose weights {streams} stream from main memory for every row, as the "
            f"{self.profile.name} needs {_gb(need_bytes)}, more than these slots have: {chosen.step_ms:.3g} ms predicted a step, "
            f"{alone.step_ms / chosen.step_ms:.2f}x of streaming to slot {alone.slot_indexes[0]} alone"
        )

    def _sharing_text(self, chosen: Candidate) -> str:
        if self.job.images == 1 and self.job.branches == 2 and chosen.dealt == (1, 1):
            return "cond and uncond side by side"
        return f"{self.job.num_rows} rows dealt {':'.join(str(rows) for rows in chosen.dealt)}"

    def _shares_text(self, chosen: Candidate) -> str:
        held = " and ".join(_gb(chosen.peak_bytes[index]) for index in chosen.slot_indexes)
        return f"{held} at the peak"

    def why_single(self, single: Candidate, best: Candidate | None) -> str:
        alone = f"slot {single.slot_indexes[0]} alone, {single.step_ms:.3g} ms predicted a step"
        if len(self.slots) == 1:
            return f"{alone}: it is the only slot"
        if self.job.num_rows == 1 and best is None:
            return f"{alone}: one image without CFG is one row, and {self._why_no_tiles() or 'no tiles of it fit'}"
        if best is None:
            return f"{alone}: no plan over several slots that fits is predicted to be faster"
        several = f"{best.strategy} on {_slots_text(best.slot_indexes)}"
        return f"{alone}: the best over several ({several}) is predicted at {single.step_ms / best.step_ms:.2f}x, below {LEAST_GAIN}x"

    def _why_no_tiles(self) -> str | None:
        """Why rows cannot be cut into tiles on any slots; None if they can."""
        traffic = self.profile.tiles
        if self.job.why_no_tiles is not None or traffic is None:
            return f"it cannot be cut into tiles: {self.job.why_no_tiles or 'this network has none'}"
        if traffic.length < 2 * traffic.unit:
            return f"its {traffic.length} rows are too few for two tiles of at least {traffic.unit}"
        return None

    def _slot_of_all_rows(self) -> int | None:
        """The slot that gets all rows even if only the second fastest shares them with it; None if there is none."""
        fastest, second = sorted(self.slots, key=lambda slot: -slot.speed)[:2]
        return fastest.index if 0 in deal_by_speed(self.job.num_rows, [fastest.speed, second.speed]) else None

    def why_not(self, wanted: str) -> str:
        if wanted != "single" and len(self.slots) == 1:
            return "there is one slot"
        if wanted == "replicas" and self.job.num_rows == 1:
            return "there is one row a step"
        if wanted == "replicas" and (fastest := self._slot_of_all_rows()) is not None:
            return f"slot {fastest} is so much faster than the others that it gets all {self.job.num_rows} rows"
        if wanted == "hybrid" and len(self.slots) < 3:
            return "there are two slots"
        if wanted == "tiles" and (reason := self._why_no_tiles()) is not None:
            return reason
        need_bytes = self.profile.weight_bytes + self.profile.working_bytes_per_row()
        rooms = ", ".join(f"slot {slot.index}: {_gb(max(0, slot.free_bytes))}" for slot in self.slots)
        return f"does not fit ({self.profile.name} {_gb(need_bytes)}; {rooms})"


def _slots_text(indexes: Sequence[int]) -> str:
    if len(indexes) == 1:
        return f"slot {indexes[0]}"
    return f"slots {', '.join(str(index) for index in indexes[:-1])} and {indexes[-1]}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / _GB:.2f} GB" if num_bytes >= 0.1 * _GB else f"{num_bytes / 1e6:.1f} MB"
