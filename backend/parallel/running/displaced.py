"""Which passes of a run may use what other tiles sent a step ago, and the messages kept for that. Knows no samplers and no network.

Displaced exchanges (Li et al. 2024, "DistriFusion"): the network's input changes little from step to step, so other tiles' boundary rows, norm sums,
keys and values of the step before are nearly those of this one, and nobody has to wait for them. The result is an approximation, so a user has to ask
for it, and the first passes, and those after a change of what the network computes, are exact.

Example, exact for 4 of 20 passes: passes 0..3 wait; pass 4 reads what was sent in pass 3, and sends what pass 5 reads.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backend.nn.deferred_control import DeferredControl
from backend.nn.network_call import NetworkCall
from backend.nn.tiles import NormMemory
from backend.parallel.exchange.meeting import Meeting
from backend.parallel.planning.plan import TileTeam

_STEADY = ("context", "y", "text_lengths", "guidance")
"""Inputs that change only where the prompt or the sizes do."""
_MOST_TRACKS = 2
"""Kinds of calls that alternate in a step, such as prompt and negative prompt of different lengths."""


@dataclass(slots=True, eq=False)
class KeptPass:
    """What the next pass of the same rows may use: the meeting with its messages, and each tile's own norm sums, by rank. `team` computed it."""

    team: TileTeam
    meeting: Meeting
    norms: Sequence[NormMemory]

    @classmethod
    def follow(cls, before: KeptPass | None, team: TileTeam, meeting: Meeting) -> KeptPass:
        """A pass that has not run. With `before` it takes that pass's messages."""
        meeting.keeps = True
        meeting.before = None if before is None else before.meeting
        sums = [{}] * len(team.slots) if before is None else [one.now for one in before.norms]
        return cls(team, meeting, [NormMemory(before=one) for one in sums])


@dataclass(slots=True, eq=False)
class _Track:
    """Calls of one kind, which follow each other step by step: how many there were, when the last was, its inputs that rarely change and its time,
    how the time changed, and its passes by their place in the call."""

    num_calls: int = 0
    last_call: int = 0
    steady: Mapping[str, Tensor] = field(default_factory=dict)
    time: Tensor | None = None
    change: Tensor | None = None
    kept: dict[int, KeptPass] = field(default_factory=dict)

    def drop(self) -> None:
        """Free what was kept."""
        for one in self.kept.values():
            one.meeting.drop_messages()
        self.kept.clear()

    def follow(self, call: NetworkCall, number: int) -> bool:
        """Note a call. Returns whether the one before had the same texts and the noise level moves on in the same direction. One number is read from
        the device."""
        time = call.rows["timesteps"].detach().float().mean()
        steady = {name: call.rows[name] for name in _STEADY if name in call.rows}
        change = None if self.time is None else time - self.time
        checks = [(steady[name] == tensor).all() for name, tensor in self.steady.items()]
        if change is not None and self.change is not None:
            checks.append(change * self.change >= 0)
        is_near = self.num_calls > 0 and number - self.last_call <= _MOST_TRACKS
        self.num_calls, self.last_call, self.steady, self.time, self.change = self.num_calls + 1, number, steady, time, change
        return is_near and bool(torch.stack([check.to(time.device) for check in checks]).all() if checks else True)


@dataclass(slots=True, eq=False)
class DisplacedPasses:
    """Decides for each call, and keeps its passes for the next of its kind. Used by one thread.

    `exact_calls`: how many calls of a kind are exact before the first that is not. `num_displaced`: calls that were not exact so far.
    """

    exact_calls: int
    num_displaced: int = 0
    _num_calls: int = 0
    _tracks: dict[Hashable, _Track] = field(default_factory=dict)
    _current: _Track = field(default_factory=_Track)

    def admits(self, call: NetworkCall) -> bool:
        """Whether the call may be displaced: enough exact ones came before, and the one before computed the same a step earlier. Call it once for
        each. Waits for the inputs' device."""
        self._num_calls += 1
        kind = _kind_of(call)
        track = self._current = self._tracks.pop(kind, _Track())
        self._tracks[kind] = track  # the last one now
        while len(self._tracks) > _MOST_TRACKS:
            self._tracks.pop(next(iter(self._tracks))).drop()
        is_displaced = track.follow(call, self._num_calls) and track.num_calls > self.exact_calls and bool(track.kept)
        self.num_displaced += is_displaced
        if not is_displaced:
            track.drop()
        return is_displaced

    def take(self, place: int, team: TileTeam) -> KeptPass | None:
        """What the team's pass at that place of the call before left."""
        found = self._current.kept.pop(place, None)
        if found is not None and found.team is not team:
            found.meeting.drop_messages()
            return None
        return found

    def keep(self, passes: Sequence[KeptPass]) -> None:
        """What the passes of a finished call leave for the next."""
        for place, one in enumerate(passes):
            one.meeting.before = None
            self._current.kept[place] = one

    def forget(self) -> None:
        """After a failure: the next calls are exact."""
        for track in self._tracks.values():
            track.drop()
        self._tracks.clear()
        self._current = _Track()


def _kind_of(call: NetworkCall) -> Hashable:
    """Calls of one kind have the same exchanges."""
    control, options = call.control, call.options
    links = tuple(isinstance(part, dict) for part in control.parts) if isinstance(control, DeferredControl) else control is None
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(call.rows.items()))
    return shapes, links, tuple(options.get("cond_or_uncond") or ()), tuple(options.get("skip_layers") or ())
