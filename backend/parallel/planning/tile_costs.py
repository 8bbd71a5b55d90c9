"""Which teams of slots could compute rows in tiles, and what that costs. Pure arithmetic on the facts the planner has.

A team is one or more slots, each with a whole copy of the network; it computes every one of its rows together, a tile on each slot.

    time of a team = its slowest tile * loss + exchanges * latency + the bytes that arrive at its busiest slot / the link's speed

Displaced steps wait for nothing: the slowest tile, or the bytes if they take longer. They keep what arrives in a step until the next has read it.

Example: one row on four equal slots is one team of four; with CFG, two teams of two are better, because fewer bytes cross.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from backend.nn.tiles import TileTraffic, divide_into_tiles
from backend.parallel.planning.candidate import JobShape
from backend.parallel.planning.copy_costs import CopyCosts, SharedControls
from backend.parallel.planning.costs import ComponentCost, ModelProfile
from backend.parallel.planning.plan import TileTeam
from backend.parallel.planning.slot_facts import LinkTable, SlotFacts

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
_KEPT_STEPS = 2
"""Steps whose messages are in memory at once if they are displaced: the one before, and the current one's, which replace them."""
_MOST_PARTITIONED = 5

Team = tuple[SlotFacts, ...]


@dataclass(frozen=True, slots=True)
class TileCosts:
    """Costs of a job's rows in tiles. `traffic`: what tiles of one row exchange. `shared_controls`: ControlNets whose passes run whole on one slot;
    the others are computed in the teams' tiles."""

    profile: ModelProfile
    traffic: TileTraffic
    table: LinkTable
    job: JobShape
    slots: tuple[SlotFacts, ...]
    shared_controls: SharedControls = field(default_factory=dict)

    def control_places(self, teams: Sequence[Team]) -> Iterator[TileCosts]:
        """These costs for every choice of where ControlNets run. Those that cannot be cut run whole on some slot."""
        must_share = {control.name for control in self.job.control_networks if control.tiles is None}
        members = tuple(slot for team in teams for slot in team)
        for shared in CopyCosts(self.profile, self.slots, self.table, self.job).shared_control_places(members):
            if must_share <= shared.keys():
                yield replace(self, shared_controls=shared)

    @property
    def tiled_controls(self) -> tuple[ComponentCost, ...]:
        """ControlNets that are computed in tiles, with a copy on every slot of every team."""
        return tuple(control for control in self.job.control_networks if control.name not in self.shared_controls)

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
        """Time of `num_rows` rows of a step on a team, with its ControlNets."""
        profile = self.profile
        network_ms = self._parts_ms(team, tiles, num_rows, (profile.work_per_row, profile.weight_bytes, profile.num_kernels))
        controls_ms = sum(
            self._parts_ms(team, tiles, num_rows, (control.flops_per_row, control.weight_bytes, control.num_kernels))
            for control in self.tiled_controls
        )
        way_ms = max(self._way_ms(slot, num_rows) for slot in team)
        waits_ms = self._wait_ms(team, num_rows, controls_ms + profile.share_before_control * network_ms)
        computing_ms, (latency_ms, bytes_ms) = network_ms + controls_ms + waits_ms, self._exchanges_ms(team, tiles, num_rows)
        exact_ms, displaced_ms = computing_ms + latency_ms + bytes_ms, max(computing_ms, bytes_ms)
        return self.job.exact_share * exact_ms + (1.0 - self.job.exact_share) * displaced_ms + way_ms

    def _parts_ms(self, team: Team, tiles: TileTeam, num_rows: int, work: tuple[float, int, int]) -> float:
        """Time of the slowest tile of `num_rows` rows. `work`: FLOPs of a row, bytes of weights, number of kernels."""
        flops, weight_bytes, num_kernels = work
        loss = TILE_LOSS if len(team) > 1 else 1.0
        forwards = CopyCosts(self.profile, self.slots, self.table, self.job).forwards(num_rows)
        return max(
            loss * math.fsum(slot.forward_ms(rows * flops * share, weight_bytes, num_kernels) for rows in forwards)
            for slot, share in zip(team, tiles.shares)
        )

    def _wait_ms(self, team: Team, num_rows: int, before_ms: float) -> float:
        """How much longer a team takes because of whole passes of ControlNets. Its own slots run them first, and the other tiles wait at the next
        exchange; other slots run them while the team works for `before_ms`."""
        costs = CopyCosts(self.profile, self.slots, self.table, self.job, self.shared_controls)
        own_ms = max((costs.busy_ms(slot) for slot in team), default=0.0)
        residual_bytes = num_rows * self.profile.control_bytes_per_row
        arriving_ms = [
            costs.busy_ms(source) + max(self.table.latency_ms(source, slot) + residual_bytes * self.table.ms_per_byte(source, slot) for slot in team)
            for source in self.shared_controls.values()
            if source not in team
        ]
        return own_ms + max([0.0, *(one - own_ms - before_ms for one in arriving_ms)])

    def _exchanges_ms(self, team: Team, tiles: TileTeam, num_rows: int) -> tuple[float, float]:
        """Latencies of all exchanges, and the time of the bytes that arrive at the busiest slot."""
        if len(team) == 1:
            return 0.0, 0.0
        num_forwards = len(CopyCosts(self.profile, self.slots, self.table, self.job).forwards(num_rows))
        pairs = [(source, target) for source in team for target in team if source is not target]
        latency_ms = max(self.table.latency_ms(source, target) for source, target in pairs)
        latency_ms += 0.0 if all(slot.kind == "cuda" for slot in team) else RESUME_MS
        arriving = self._arriving_bytes(tiles)
        slowest = [max(self.table.ms_per_byte(source, target) for source in team if source is not target) for target in team]
        bytes_ms = max(num_bytes * ms_per_byte for num_bytes, ms_per_byte in zip(arriving, slowest))
        return num_forwards * self._num_exchanges * latency_ms, num_rows * bytes_ms

    @property
    def _all_traffic(self) -> list[TileTraffic]:
        """Of the network and its ControlNets in tiles."""
        return [self.traffic, *(control.tiles for control in self.tiled_controls if control.tiles is not None)]

    @property
    def _num_exchanges(self) -> int:
        return sum(traffic.num_exchanges for traffic in self._all_traffic)

    def _arriving_bytes(self, tiles: TileTeam) -> list[int]:
        """Bytes of a row that arrive at each slot."""
        return [sum(parts) for parts in zip(*(one.arriving_bytes(tiles.rows, self.profile.itemsize) for one in self._all_traffic))]

    def _way_ms(self, slot: SlotFacts, num_rows: int) -> float:
        """Time of latents and results between the primary and a slot."""
        primary = self.slots[0]
        latency_ms = self.table.latency_ms(primary, slot) + self.table.latency_ms(slot, primary)
        return latency_ms + num_rows * self.profile.copy_bytes_per_row * self.table.ms_per_byte(primary, slot)

    def launches_ms(self, teams: Sequence[Team], dealt: Sequence[int]) -> float:
        """Launch time of all slots together: they share one interpreter, and every tile launches what the whole would."""
        costs = CopyCosts(self.profile, self.slots, self.table, self.job)
        exchanges_ms = self._num_exchanges * LAUNCH_EXCHANGE_MS
        kernels = self.profile.num_kernels + sum(control.num_kernels for control in self.tiled_controls)
        own_ms = sum(
            len(costs.forwards(rows)) * (kernels * slot.kernel_ms + (exchanges_ms if len(team) > 1 else 0.0))
            for team, rows in zip(teams, dealt)
            for slot in team
            if slot.kernel_ms > 0
        )
        num_forwards = len(costs.forwards(self.job.num_rows))
        return own_ms + sum(
            num_forwards * control.num_kernels * self.shared_controls[control.name].kernel_ms
            for control in self.job.control_networks
            if control.name in self.shared_controls
        )

    def crossing_bytes(self, teams: Sequence[Team], tiles: Sequence[TileTeam], dealt: Sequence[int]) -> int:
        """Bytes that cross between devices in a step."""
        total = 0
        for team, tile_team, rows in zip(teams, tiles, dealt):
            crosses = any(self.table.crosses(source, target) for source in team for target in team)
            total += rows * sum(self._arriving_bytes(tile_team)) if crosses else 0
            for slot, share in zip(team, tile_team.shares):
                num_sources = sum(self.table.crosses(other, slot) for other in self.shared_controls.values())
                total += int(num_sources * rows * share * self.profile.control_bytes_per_row)
            total += sum(rows * self.profile.copy_bytes_per_row for slot in team if self.table.crosses(self.slots[0], slot))
        return total

    def place(self, teams: Sequence[Team], tiles: Sequence[TileTeam], dealt: Sequence[int]) -> tuple[dict[int, int], dict[str, int]]:
        """Peak bytes per slot, and the slot of each component: ControlNets where they run (in tiles: the first team's first slot), the others where
        most is free."""
        peak_bytes = self._peak_bytes(teams, tiles, dealt)
        component_slots = {control.name: self.shared_controls.get(control.name, teams[0][0]).index for control in self.job.control_networks}
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
        weight_bytes = self.profile.weight_bytes + sum(control.weight_bytes for control in self.tiled_controls)
        for team, tile_team, rows in zip(teams, tiles, dealt):
            if self.job.exact_share < 1 and len(team) > 1:
                for slot, num_bytes in zip(team, self._arriving_bytes(tile_team)):
                    found[slot.index] += _KEPT_STEPS * rows * num_bytes
            for slot, share in zip(team, tile_team.shares):
                whole = max([self.profile.working_bytes_per_row(), *(control.working_bytes_per_row for control in self.tiled_controls)])
                working = whole * min(1.0, share + TILE_EXTRA)
                if self.job.control_networks:
                    found[slot.index] += int(rows * share * self.profile.control_bytes_per_row)
                found[slot.index] += int(min(most_rows, max(1, rows)) * working) + (0 if slot.device in holders else weight_bytes)
                holders.add(slot.device)
        for control in self.job.control_networks:
            if control.name in self.shared_controls:
                place = self.shared_controls[control.name].index
                working = max(1, self.job.rows_per_forward) * control.working_bytes_per_row
                found[place] += control.weight_bytes + working + self.job.num_rows * self.profile.control_bytes_per_row
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
