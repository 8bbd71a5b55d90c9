"""Where the tiles of one batch of rows exchange messages. Nobody blocks: a tile that waits leaves a function to call once everything has arrived.

A `Meeting` lives for one pass of the network. All tiles run the same code, so the n-th post of one matches the n-th post of the others, whichever
thread comes first. Every wait ends: with the messages, or by `cancel`, which calls all waiting tiles and drops what is in transit.

A pass may take the messages of the pass before instead of its own (`before`, displaced exchanges): those were sent a step ago, so nobody waits.
Its own messages then stay for the pass after it (`keeps`).

CUDA: a message has arrived here when its copy has been enqueued; `Transfer.receive` makes the receiver's stream wait for it, not the host.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from backend.nn.tiles import Awaited, Received, Tensors
from backend.parallel.exchange.copies import when_arrived
from backend.parallel.exchange.messages import PackedMessage, send_message
from backend.parallel.exchange.transport import Transfer

_Key = tuple[int, int, int]
"""(number of the exchange, rank of the sender, rank of the receiver)."""


class ReleasedError(RuntimeError):
    """Another tile ended the pass. This is never the cause; the caller gets the cause instead."""


class ShipToTile(Protocol):
    """Starts a copy to the tile with that rank."""

    def __call__(self, tensor: Tensor, rank: int, /) -> Transfer: ...


@dataclass(slots=True)
class _Wait:
    """A suspended tile: what has not arrived yet, and how to resume it."""

    missing: set[_Key]
    resume: Callable[[], None]


@dataclass(slots=True, eq=False)
class Meeting:
    """The exchanges of one pass. `devices` of the tiles by rank. Thread-safe.

    `keeps`: messages stay here when they are taken, for the next pass. `before`: the meeting of the pass before, whose messages this pass takes and
    removes; None if it takes its own.
    """

    devices: Sequence[torch.device]
    ship: ShipToTile
    keeps: bool = False
    before: Meeting | None = None
    _arrived: dict[_Key, PackedMessage] = field(default_factory=dict)
    _waiting: dict[int, _Wait] = field(default_factory=dict)
    _is_cancelled: bool = False
    _errors: dict[int, BaseException] = field(default_factory=dict)
    _num_in_transit: int = 0
    _lock: threading.Condition = field(default_factory=threading.Condition)

    def post(self, number: int, sender: int, outgoing: Mapping[int, Tensors]) -> None:
        """Start sending a tile's messages. Raises: ReleasedError after a cancel; what starting the copies raises."""
        self.raise_if_cancelled(sender)
        for receiver, tensors in outgoing.items():
            messages = [self._send(sender, receiver, tuple(map(_without_rest, tensors)) if self.keeps else tensors)]
            with self._lock:
                self._num_in_transit += 1
            when_arrived(messages[0].transfers, partial(self._deliver, (number, sender, receiver), messages))

    def _send(self, sender: int, receiver: int, tensors: Tensors) -> PackedMessage:
        try:
            return send_message(tensors, lambda tensor: self.ship(tensor, receiver), stays_here=self.devices[sender] == self.devices[receiver])
        except torch.AcceleratorError as error:
            self.cancel(errors={receiver: error})
            raise

    def _deliver(self, key: _Key, messages: list[PackedMessage], failure: BaseException | None) -> None:
        """`messages` is the one message. It is taken out, as a copy's future keeps its callbacks alive and would keep itself with them."""
        message = messages.pop()
        with self._lock:
            self._num_in_transit -= 1
            self._lock.notify_all()
        if failure is not None:
            self.cancel(errors={key[1]: failure, **({key[2]: failure} if isinstance(failure, torch.AcceleratorError) else {})})
            return
        resume = None
        with self._lock:
            if self._is_cancelled:
                return
            self._arrived[key] = message
            wait = self._waiting.get(key[2])
            if wait is not None:
                wait.missing.discard(key)
                if not wait.missing:
                    resume = self._waiting.pop(key[2]).resume
        if resume is not None:
            resume()

    def take_or_wait(self, rank: int, awaited: Awaited, resume: Callable[[], None]) -> Received | None:
        """What came, if all of it has arrived. Else None, and `resume()` is called once it has, or after a cancel; then ask again.

        Raises: ReleasedError after a cancel; torch.AcceleratorError if a copy to this tile's device failed.
        """
        if self.before is not None:
            self.raise_if_cancelled(rank)
            return self.before._take(rank, awaited, resume, removes=True)
        return self._take(rank, awaited, resume, removes=not self.keeps)

    def _take(self, rank: int, awaited: Awaited, resume: Callable[[], None], *, removes: bool) -> Received | None:
        keys = {peer: (awaited.number, peer, rank) for peer in awaited.peers}
        with self._lock:
            self._raise_if_cancelled(rank)
            missing = {key for key in keys.values() if key not in self._arrived}
            if missing:
                self._waiting[rank] = _Wait(missing, resume)
                return None
            messages = {peer: self._arrived.pop(key) if removes else self._arrived[key] for peer, key in keys.items()}
        return {peer: message.open() for peer, message in messages.items()}

    def cancel(self, errors: Mapping[int, BaseException] | None = None) -> None:
        """End every wait, now and later, and drop all messages. Tiles raise ReleasedError from now on, and those in `errors` their own error.

        A copy between two devices fails when either is dead. Both ends then raise the device's error, so that each one's worker checks whether its
        device is the dead one.
        """
        with self._lock:
            self._is_cancelled = True
            self._errors = {**(errors or {}), **self._errors}
            waiting, self._waiting = list(self._waiting.values()), {}
            self._arrived.clear()
        for wait in waiting:
            wait.resume()
        if self.before is not None:
            self.before.cancel(errors)

    def drop_messages(self) -> None:
        """Free what was kept for a next pass that does not come. A copy's future keeps its callbacks, and with them this meeting, alive."""
        with self._lock:
            self._arrived.clear()

    def wait_for_copies(self) -> None:
        """Wait until nothing is in transit any more, so that failed tiles leave no memory behind. Not for a worker's thread."""
        with self._lock:
            self._lock.wait_for(lambda: self._num_in_transit == 0)
        if self.before is not None:
            self.before.wait_for_copies()

    def raise_if_cancelled(self, rank: int) -> None:
        """For the tile with this rank. Raises as `take_or_wait`."""
        with self._lock:
            self._raise_if_cancelled(rank)

    def _raise_if_cancelled(self, rank: int) -> None:
        if rank in self._errors:
            raise _again(self._errors[rank])
        if self._is_cancelled:
            raise ReleasedError("This tile stopped because another tile of the row did. See the other tile's error for the cause.")


@dataclass(slots=True, eq=False)
class TilePeers:
    """One tile's access to the meeting: the `Peers` that its code posts to. Used only by the tile's own thread."""

    meeting: Meeting
    rank: int
    before_exchange: Callable[[], None] | None = None
    num_exchanges: int = 0

    @property
    def count(self) -> int:
        return len(self.meeting.devices)

    def post(self, outgoing: Mapping[int, Tensors]) -> Awaited:
        if self.before_exchange is not None:
            self.before_exchange()
        self.num_exchanges += 1
        self.meeting.post(self.num_exchanges, self.rank, outgoing)
        return Awaited(self.num_exchanges, tuple(outgoing))


def _without_rest(tensor: Tensor) -> Tensor:
    """A copy of a part, because keeping a view would keep the whole tensor."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _again(error: BaseException) -> BaseException:
    """The error for another tile: a new one of a device's kind, because the first belongs to the thread that raised it."""
    return torch.AcceleratorError(f"Copying between tiles failed: {error}") if isinstance(error, torch.AcceleratorError) else error
