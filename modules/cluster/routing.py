"""Chooses the worker for a job. Pure: knows workers and jobs as numbers and names; no network, no clock, no Ray.

A worker that has the job's checkpoint loaded saves the load; one that has its networks (LoRA) too saves patching. Where all those are busy, the
job waits for one as long as that is likely to be shorter than a load elsewhere. Otherwise the worker that is missed least loads it: an empty
one, else one of the checkpoint with the most idle copies for its demand.

Every worker that could take a job is in one dict per checkpoint, so a choice looks at a few workers and not at a thousand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

NOTHING_LOADED = ""
LOOKED_AT = 16
"""How many workers with the same checkpoint are compared for a job."""
_DEMAND_KEPT = 0.999
"""Share of a checkpoint's demand that is left after another job: about the last thousand jobs count."""
_TIME_KEPT = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What a job needs. `need_bytes` is memory on a worker's largest slot; 0 if unknown. `excluded`: workers on which it has failed."""

    checkpoint: str
    networks: frozenset[str] = frozenset()
    need_bytes: int = 0
    excluded: frozenset[str] = frozenset()


@dataclass(kw_only=True, slots=True)
class Candidate:
    """A worker. `speed`: how fast it computes compared with others; 1 is average. `room`: jobs it could still take now."""

    name: str
    checkpoint: str = NOTHING_LOADED
    networks: frozenset[str] = frozenset()
    total_bytes: int = 0
    speed: float = 1.0
    room: int = 1
    is_open: bool = True

    def can_take(self, need: Need) -> bool:
        """Whether the job may run here now."""
        fits = not self.total_bytes or need.need_bytes <= self.total_bytes
        return self.is_open and self.room > 0 and fits and self.name not in need.excluded


@dataclass(kw_only=True, slots=True)
class _Group:
    """Workers with the same checkpoint loaded, by name; `demand` counts recent jobs for it, older ones less."""

    idle: dict[str, Candidate] = field(default_factory=dict)
    num_workers: int = 0
    demand: float = 0.0
    demand_at: int = 0


class Router:
    """Knows every worker and what it has loaded. Not thread-safe: its owner holds a lock."""

    def __init__(self, *, load_s: float = 10.0, job_s: float = 10.0) -> None:
        """`load_s`, `job_s`: how long a load and a job take, until some were measured."""
        self.load_s = load_s
        self.job_s = job_s
        self.num_loads = 0
        self.num_placed = 0
        self._workers: dict[str, Candidate] = {}
        self._groups: dict[str, _Group] = {}
        self._measured: set[str] = set()

    # What workers are there

    def add(self, worker: Candidate) -> None:
        """A worker joined, or what is known about it changed."""
        self.remove(worker.name)
        self._workers[worker.name] = worker
        group = self._group(worker.checkpoint)
        group.num_workers += 1
        if worker.is_open and worker.room > 0:
            group.idle[worker.name] = worker

    def remove(self, name: str) -> None:
        """A worker left. A name that is not known is ignored."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            group = self._groups[worker.checkpoint]
            group.num_workers -= 1
            group.idle.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._workers

    def __iter__(self) -> Iterator[Candidate]:
        return iter(list(self._workers.values()))

    def find(self, name: str) -> Candidate | None:
        """The worker of that name; None if it is not known."""
        return self._workers.get(name)

    def num_idle(self) -> int:
        """Workers that could take a job now."""
        return sum(len(group.idle) for group in self._groups.values())

    def has_idle(self, checkpoint: str) -> bool:
        """Whether a worker that has the checkpoint loaded could take a job now."""
        group = self._groups.get(checkpoint)
        return group is not None and bool(group.idle)

    # Jobs

    def place(self, need: Need, *, waited_s: float = 0.0) -> str | None:
        """The worker for a job that has waited `waited_s`, whose room is then taken; None if the job had better wait."""
        chosen = self._with_checkpoint(need)
        if chosen is None and waited_s < self._patience_s(need):
            return None
        if chosen is None:
            chosen = self._least_missed(need)
            if chosen is None:
                return None
            self.num_loads += 1
        self.num_placed += 1
        self._note_demand(need.checkpoint)
        self._take(chosen, need)
        return chosen.name

    def release(self, name: str, *, checkpoint: str | None = None, networks: frozenset[str] | None = None) -> None:
        """A job on `name` ended; what the worker has loaded now, if it said so."""
        worker = self._workers.get(name)
        if worker is None:
            return
        worker.room += 1
        self._move(worker, worker.checkpoint if checkpoint is None else checkpoint)
        worker.networks = worker.networks if networks is None else networks

    def note_times(self, *, job_s: float | None = None, load_s: float | None = None) -> None:
        """Measured times of a job or a load; the first replaces what was assumed, and of the others later ones count more."""
        for name, seconds in (("job_s", job_s), ("load_s", load_s)):
            if seconds is not None:
                kept = _TIME_KEPT if name in self._measured else 0.0
                self._measured.add(name)
                setattr(self, name, kept * getattr(self, name) + (1 - kept) * max(0.0, seconds))

    # The choice

    def _with_checkpoint(self, need: Need) -> Candidate | None:
        """The best worker that has the checkpoint: with the networks if possible, then the fastest, then the first."""
        group = self._groups.get(need.checkpoint)
        fitting = [] if group is None else _first(group.idle, need, LOOKED_AT)
        return max(fitting, key=lambda one: (need.networks <= one.networks, one.networks == need.networks, one.speed), default=None)

    def _patience_s(self, need: Need) -> float:
        """How long a job waits for a busy worker with its checkpoint: not at all if no such worker can take it, else up to the time of a load.

        For example four busy workers that take 10 s per job free one every 2.5 s: with a load of 10 s it pays to wait.
        """
        group = self._groups.get(need.checkpoint)
        busy = 0 if group is None else group.num_workers - len(group.idle)
        if busy == 0 or need.excluded or self.job_s / busy >= self.load_s:
            return 0.0
        return self.load_s

    def _least_missed(self, need: Need) -> Candidate | None:
        """The worker that loads the checkpoint: one with nothing loaded, else of the group with the most idle workers for its demand."""
        groups = [(self._surplus(name, group), name) for name, group in self._groups.items() if group.idle and name != need.checkpoint]
        for _, name in sorted(groups, reverse=True):
            fitting = _first(self._groups[name].idle, need, LOOKED_AT)
            if fitting:
                return max(fitting, key=lambda one: one.speed)
        return None

    def _surplus(self, name: str, group: _Group) -> float:
        if name == NOTHING_LOADED:
            return float("inf")
        return len(group.idle) / (self._demand(group) + 1e-3)

    def _take(self, worker: Candidate, need: Need) -> None:
        worker.room -= 1
        worker.networks = need.networks
        self._move(worker, need.checkpoint)

    def _move(self, worker: Candidate, checkpoint: str) -> None:
        """Put the worker where its checkpoint and its room belong."""
        before = self._group(worker.checkpoint)
        before.idle.pop(worker.name, None)
        before.num_workers -= 1
        worker.checkpoint = checkpoint
        after = self._group(checkpoint)
        after.num_workers += 1
        if worker.is_open and worker.room > 0:
            after.idle[worker.name] = worker

    def _group(self, checkpoint: str) -> _Group:
        return self._groups.setdefault(checkpoint, _Group())

    def _note_demand(self, checkpoint: str) -> None:
        group = self._group(checkpoint)
        group.demand = self._demand(group) + 1
        group.demand_at = self.num_placed

    def _demand(self, group: _Group) -> float:
        return group.demand * _DEMAND_KEPT ** (self.num_placed - group.demand_at)


def _first(workers: dict[str, Candidate], need: Need, limit: int) -> list[Candidate]:
    """Up to `limit` workers that can take the job."""
    found: list[Candidate] = []
    for worker in workers.values():
        if worker.can_take(need):
            found.append(worker)
            if len(found) == limit:
                break
    return found
