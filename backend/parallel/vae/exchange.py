"""How the strips of one picture exchange tensors between workers, and how all of them stop when one fails.

Knows no network. A `Board` lives for one decode; every strip has `StripLinks` to it. All strips run the same program, so the n-th swap of one
matches the n-th swap of the others, whichever thread comes first.

CUDA: a worker copies with `.to(device)` in its own thread, which torch orders between the two devices' current streams, and records an
event after the copy. The receiver's stream waits for the event and is recorded as a user of the memory. No host synchronization.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_WITH_STREAMS = ("cuda", "xpu")

Key = tuple[int, int, int]
"""(number of the swap, rank of the sender, rank of the receiver)."""


class ReleasedError(RuntimeError):
    """Another strip ended the decode. This is never the cause; the caller gets the cause instead."""


class SplitStalledError(RuntimeError):
    """A strip waited for another strip longer than allowed."""


@dataclass(frozen=True, slots=True)
class Message:
    """Tensors on the receiver's device and, on devices with streams, the event after which they may be read."""

    tensors: tuple[Tensor, ...]
    ready: Any = None


def pack(tensors: Sequence[Tensor], device: torch.device) -> Message:
    """A message with copies on `device`, made by the calling thread. Tensors already there are passed as they are, so never change them later."""
    moved = tuple(tensor.to(device) for tensor in tensors)
    if device.type not in _WITH_STREAMS:
        return Message(moved)
    module: Any = torch.get_device_module(device)
    ready = module.Event()
    ready.record(module.current_stream(device))
    return Message(moved, ready)


def unpack(message: Message) -> tuple[Tensor, ...]:
    """The tensors, safe to use on the calling thread's stream."""
    if message.ready is not None and message.tensors:
        device = message.tensors[0].device
        stream: Any = torch.get_device_module(device).current_stream(device)
        stream.wait_event(message.ready)
        for tensor in message.tensors:
            tensor.record_stream(stream)
    return message.tensors


class Board:
    """The mailboxes of one decode. Every wait ends: with the message, by `abort`, or after `stall_s` seconds."""

    def __init__(self, *, stall_s: float) -> None:
        self._stall_s = stall_s
        self._changed = threading.Condition()
        self._messages: dict[Key, Message] = {}
        self._is_aborted = False
        self._accused: dict[int, str] = {}

    def post(self, key: Key, message: Message) -> None:
        """Leave a message for its receiver. Raises: ReleasedError after an abort."""
        with self._changed:
            self._raise_if_aborted(key[1])
            self._messages[key] = message
            self._changed.notify_all()

    def take(self, key: Key) -> Message:
        """Wait for the message and remove it from the board. Raises: ReleasedError, SplitStalledError."""
        deadline_s = time.monotonic() + self._stall_s
        with self._changed:
            while key not in self._messages:
                self._raise_if_aborted(key[2])
                if not self._changed.wait(deadline_s - time.monotonic()) and key not in self._messages:
                    raise SplitStalledError(self._describe_stall(key))
            self._raise_if_aborted(key[2])
            return self._messages.pop(key)

    def abort(self, *, accused: int | None = None, because: BaseException | None = None) -> None:
        """End every wait, now and later, and drop all messages.

        A copy to another device fails in the sender's thread when either device is dead. The receiver, `accused`, then raises the device's error
        too, so that its own worker checks whether its device is the dead one.
        """
        with self._changed:
            self._is_aborted = True
            if accused is not None:
                self._accused[accused] = f"Copying to this device failed: {because}"
            self._messages.clear()
            self._changed.notify_all()

    def raise_if_aborted(self, rank: int) -> None:
        """For the strip with this rank. Raises: ReleasedError; torch.AcceleratorError if a copy to its device failed."""
        with self._changed:
            self._raise_if_aborted(rank)

    def _raise_if_aborted(self, rank: int) -> None:
        if rank in self._accused:
            raise torch.AcceleratorError(self._accused[rank])
        if self._is_aborted:
            raise ReleasedError("This strip stopped because another strip of the picture did. See the other strip's error for the cause.")

    def _describe_stall(self, key: Key) -> str:
        step, sender, receiver = key
        return (
            f"Strip {receiver} of a split VAE decode waited {self._stall_s:g} s for strip {sender} at exchange {step}. "
            "That strip's worker is stuck, or both strips were given to the same worker thread. Give every strip its own worker, or decode whole."
        )


@dataclass(slots=True)
class StripLinks:
    """One strip's access to the board. `devices` are by rank. Used only by the strip's own thread."""

    board: Board
    rank: int
    devices: tuple[torch.device, ...]
    before_exchange: Callable[[], None] | None = None
    num_exchanges: int = 0

    @property
    def peers(self) -> tuple[int, ...]:
        """Ranks of all other strips."""
        return tuple(rank for rank in range(len(self.devices)) if rank != self.rank)

    def swap(self, outgoing: Mapping[int, Sequence[Tensor]]) -> dict[int, tuple[Tensor, ...]]:
        """Send each rank in `outgoing` its tensors and wait for what these ranks send in the same swap. Both sides must name each other.

        Other strips may read the tensors from now on: never change them in place.
        """
        if self.before_exchange is not None:
            self.before_exchange()
        self.board.raise_if_aborted(self.rank)
        self.num_exchanges += 1
        for peer, tensors in outgoing.items():
            self.board.post((self.num_exchanges, self.rank, peer), self._pack_for(peer, tensors))
        return {peer: unpack(self.board.take((self.num_exchanges, peer, self.rank))) for peer in outgoing}

    def _pack_for(self, peer: int, tensors: Sequence[Tensor]) -> Message:
        try:
            return pack(tensors, self.devices[peer])
        except torch.AcceleratorError as error:
            self.board.abort(accused=peer, because=error)
            raise
