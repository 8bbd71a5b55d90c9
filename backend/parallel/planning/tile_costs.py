"""Which teams of slots could compute rows in tiles, and what that costs. Pure arithmetic on the facts the planner has.

A team is one or more slots, each with a whole copy of the network; it computes every one of its rows together, a tile on each slot.

    time of a team = its slowest tile * loss + exchanges * latency + the bytes that arrive at its busiest slot / the link's speed

Example: one row on four equal slots is one team of four; with CFG, two teams of two are better, because fewer bytes cross.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backend.nn.tiles import TileTraffic, divide_into_tiles
from backend.parallel.planning.copy_costs import CopyCosts
from backend.parallel.planning.plan import TileTeam
from backend.parallel.planning.slot_facts import LinkTable, SlotFacts

if TYPE_CHECKING:
    from backend.parallel.planning.costs import ModelProfile
    from backend.parallel.planning.planner import JobShape

RESUME_MS = 0.08
"""Time from a message to the work of the tile that waited for it, on the other slot's worker: 54 to 81 us between two CPU slots. A CUDA card
computes meanwhile what was launched before."""
LAUNCH_EXCHANGE_MS = 0.05
"""Time of the interpreter for one exchange of one tile: 25 us measured on a CPU slot, and as much assumed for starting copies on a card."""
TILE_LOSS = 1.06
"""A tile's time in units of its share of the whole's: kernels over fewer rows are less efficient, and norms of boundary rows are computed twice.
Fitted to the field study's figures, which have it from a published run without exchanges (simulate.md)."""
TILE_EXTRA = 0.12
"""Working memory of a tile beyond its share of the whole's, as a share of the whole's: boundary rows, and all keys and values of one layer, which
are 2 of the 26 numbers that SD1.x has in memory at its peak per position and channel."""
_MOST_PARTITIONED = 5

Team = tuple[SlotFacts, ...]


@dataclass(frozen=True, slots=True)
class TileCosts:
    """Costs of a job's rows in tiles. `traffic`: what tiles of one row exchange."""

    profile: ModelProfile
    traffic: TileTraffic
    table: LinkTable
    job: JobShape
    slots: tuple[SlotFacts, ...]

    def teams(self, slots: Team) -> Iterator[tuple[Team, ...]]:
        """Ways to form teams of these slots, at most one for each row, and at least one of them of several slots."""
        if len(slots) <= _MOST_PARTITIONED:
            ways = [way for way in _partitions(slots) if len(way) <= self.job.num_rows]
        else:
            counts = range(1, min(self.job.num_rows, len(slots) // 2) + 1)
            ways = [tuple(slots[index::count] for index in range(count)) for count in counts]
        yield from (way for way in ways if any(len(team) > 1 for team in way))

    def plan_team(self, team: Team) -> TileTeam:
        """The team with how many rows of latents or tokens each slot gets, by speed. Raises: CannotTile."""
        rows = divide_into_tiles(self.traffic.length, [slot.speed for slot in team], self.traffic.unit)
        return TileTeam(slots=tuple(slot.index for slot in team), rows=rows)

    def team_ms(self, team: Team, tiles: TileTeam, num_rows: int) -> float:
        """Time of `num_rows` rows of a step on a team, with ControlNets on its first slot before."""
        profile, costs = self.profile, CopyCosts(self.profile, self.slots, self.table, self.job)
        forwards = costs.forwards(num_rows)
        loss = TILE_LOSS if len(team) > 1 else 1.0
        tile_ms = [
            loss * math.fsum(slot.forward_ms(rows * profile.work_per_row * share, profile.weight_bytes, profile.num_kernels) for rows in forwards)
            for slot, share in zip(team, tiles.shares)
        ]
        tile_ms[0] += sum(
            team[0].forward_ms(rows * control.flops_per_row, control.weight_bytes, control.num_kernels)
            for control in self.job.control_networks
            for rows in forwards
        )
        return max(tile_ms) + self._exchanges_ms(team, tiles, num_rows, len(forwards)) + max(self._way_ms(slot, num_rows) for slot in team)

    def _exchanges_ms(self, team: Team, tiles: TileTeam, num_rows: int, num_forwards: int) -> float:
        if len(team) == 1:
            return 0.0
        pairs = [(source, target) for source in team for target in team if source is not target]
        latency_ms = max(self.table.latency_ms(source, target) for source, target in pairs)
        latency_ms += 0.0 if all(slot.kind == "cuda" for slot in team) else RESUME_MS
        arriving = self.traffic.arriving_bytes(tiles.rows, self.profile.itemsize)
        slowest = [max(self.table.ms_per_byte(source, target) for source in team if source is not target) for target in team]
        bytes_ms = max(num_bytes * ms_per_byte for num_bytes, ms_per_byte in zip(arriving, slowest))
        return num_forwards * self.traffic.num_exchanges * latency_ms + num_rows * bytes_ms

    def _way_ms(self, slot: SlotFacts, num_rows: int) -> float:
        """Time of latents and results between the primary and a slot."""
        primary = self.slots[0]
        latency_ms = self.table.latency_ms(primary, slot) + self.table.latency_ms(slot, primary)
        return latency_ms + num_rows * self.profile.copy_bytes_per_row * self.table.ms_per_byte(primary, slot)

    def launches_ms(self, teams: Sequence[Team], dealt: Sequence[int]) -> float:
        """Launch time of all slots together: they share one interpreter, and every tile launches what the whole would."""
        costs = CopyCosts(self.profile, self.slots, self.table, self.job)
        exchanges_ms = self.traffic.num_exchanges * LAUNCH_EXCHANGE_MS
        return sum(
            len(costs.forwards(rows)) * (self.profile.num_kernels * slot.kernel_ms + (exchanges_ms if len(team) > 1 else 0.0))
            for team, rows in zip(teams, dealt)
            for slot in team
            if slot.kernel_ms > 0
        )

    def crossing_bytes(self, teams: Sequence[Team], tiles: Sequence[TileTeam], dealt: Sequence[int]) -> int:
        """Bytes that cross between devices in a step."""
        total = 0
        for team, tile_team, rows in zip(teams, tiles, dealt):
            crosses = any(self.table.crosses(source, target) for source in team for target in team)
            total += rows * sum(self.traffic.arriving_bytes(tile_team.rows, self.profile.itemsize)) if crosses else 0
            total += sum(rows * self.profile.copy_bytes_per_row for slot in team if self.table.crosses(self.slots[0], slot))
        return total

    def place(self, teams: Sequence[Team], tiles: Sequence[TileTeam], dealt: Sequence[int]) -> tuple[dict[int, int], dict[str, int]]:
        """Peak bytes per slot, and the slot of each component: ControlNets on each team's first slot, the others where most is free."""
        peak_bytes = self._peak_bytes(teams, tiles, dealt)
        component_slots = {control.name: teams[0][0].index for control in self.job.control_networks}
        others = sorted((component for component in self.job.components if not component.runs_per_row), key=lambda one: -one.weight_bytes)
        for component in others:
            place = max(self.slots, key=lambda slot: (slot.budget_bytes - peak_bytes[slot.index], -slot.index))
            peak_bytes[place.index] += component.weight_bytes
            component_slots[component.name] = place.index
        return peak_bytes, component_slots

    def _peak_bytes(self, teams: Sequence[Team], tiles: Sequence[TileTeam], dealt: Sequence[int]) -> dict[int, int]:
        """A whole copy, and a tile's share of the working memory. Slots on one device share weights."""
        found = {slot.index: slot.fixed_bytes for slot in self.slots}
        holders: set[str] = set()
        most_rows = max(1, self.job.rows_per_forward)
        control_bytes = sum(control.weight_bytes for control in self.job.control_networks)
        for team, tile_team, rows in zip(teams, tiles, dealt):
            for place, (slot, share) in enumerate(zip(team, tile_team.shares)):
                working = self.profile.working_bytes_per_row() * min(1.0, share + TILE_EXTRA)
                if place == 0 and self.job.control_networks:
                    working = max(working, *(control.working_bytes_per_row for control in self.job.control_networks))
                    found[slot.index] += control_bytes + rows * self.profile.control_bytes_per_row
                found[slot.index] += int(min(most_rows, max(1, rows)) * working) + (0 if slot.device in holders else self.profile.weight_bytes)
                holders.add(slot.device)
        return found


def _partitions(slots: Team) -> Iterator[tuple[Team, ...]]:
    """Every way to put all the slots into teams; the first slot is in the first team."""
    if not slots:
        yield ()
        return
    first, rest = slots[0], slots[1:]
    for chosen in range(1 << len(rest)):
        team = (first, *(slot for place, slot in enumerate(rest) if chosen >> place & 1))
        for others in _partitions(tuple(slot for place, slot in enumerate(rest) if not chosen >> place & 1)):
            yield (team, *others)
