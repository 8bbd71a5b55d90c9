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

`cut_costs` has the numbers of a cut, `cut_search` the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations

from backend.parallel.planning.costs import ModelProfile
from backend.parallel.planning.cut_costs import CutEvaluator, Partition, PartitionJob
from backend.parallel.planning.cut_search import MOST_NESTED, pick, search
from backend.parallel.planning.slot_facts import Link, LinkTable, SlotFacts


def partition(profile: ModelProfile, slots: Sequence[SlotFacts], links: Sequence[Link] = (), job: PartitionJob | None = None) -> Partition | None:
    """The best cut over some or all of the slots (see above); None if none fits. `slots[0]` is the primary, which has the latents."""
    return _partition(profile, tuple(slots), tuple(links), job or PartitionJob())


@lru_cache(maxsize=256)
def _partition(profile: ModelProfile, slots: tuple[SlotFacts, ...], links: tuple[Link, ...], job: PartitionJob) -> Partition | None:
    if not slots:
        raise ValueError("A cut over no slots was requested. Give at least one slot.")
    table = LinkTable(links)
    evaluators = [
        CutEvaluator(profile, slots, order, table, job, control_position)
        for order in _orders(slots, table)
        for control_position in _control_positions(job, slots)
    ]
    finalists = search(evaluators)
    if not finalists:
        return None
    fewest = min(score.rules_broken for score in finalists)
    best = pick([score for score in finalists if score.rules_broken == fewest])
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
