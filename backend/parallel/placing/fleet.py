"""The slots of this process: a worker for each, the transport between them, their measured speeds, and which of them are lost.

Knows no network and no plan. A fleet belongs to one configuration of memory management.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass, field

import torch

from backend import memory_management
from backend.devices.launch_graphs import CudaGraphs, GraphMaker
from backend.devices.links import Verdicts
from backend.devices.slot import Slot
from backend.memory.store import MemoryStore
from backend.nn.piece import Piece
from backend.nn.recorded_stages import StageRecorder
from backend.parallel.exchange.link_speeds import measure_links
from backend.parallel.exchange.transport import Transport, make_transport
from backend.parallel.planning.slot_facts import Link
from backend.parallel.running.worker import SlotLost, SlotWorker

logger = logging.getLogger(__name__)

SMOOTHING = 0.3
"""Weight of the newest measurement of a slot's speed."""


@dataclass(slots=True)
class SpeedBook:
    """Smoothed measured speeds in FLOPs per ms, by slot and kind of work (a model at a size). Thread-safe."""

    _flops_per_ms: dict[tuple[int, str], float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, slot: int, work: str, flops: float, busy_ms: float) -> None:
        """A slot did `flops` of work in `busy_ms`. Work or time of 0 is ignored."""
        if flops <= 0 or busy_ms <= 0:
            return
        with self._lock:
            before = self._flops_per_ms.get((slot, work))
            now = flops / busy_ms
            self._flops_per_ms[slot, work] = now if before is None else before + SMOOTHING * (now - before)

    def speed_of(self, slot: int, work: str) -> float | None:
        """FLOPs per ms; None before the first measurement."""
        with self._lock:
            return self._flops_per_ms.get((slot, work))

    def forget(self, work: str) -> None:
        """Drop the speeds for a kind of work, because its amount is counted differently from now on."""
        with self._lock:
            for key in [key for key in self._flops_per_ms if key[1] == work]:
                del self._flops_per_ms[key]


@dataclass(slots=True)
class PieceBook:
    """Measured times of a network's pieces by kind of work, scaled to a slot of speed 1. Thread-safe."""

    _by_work: dict[str, dict[Piece, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, work: str, piece: Piece, busy_ms: float) -> None:
        """Record a measurement. Later ones of the same piece are averaged with it."""
        with self._lock:
            known = self._by_work.setdefault(work, {})
            known[piece] = busy_ms if piece not in known else (known[piece] + busy_ms) / 2

    def times_of(self, work: str) -> dict[Piece, float]:
        with self._lock:
            return dict(self._by_work.get(work, {}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Measured ms of a step of one kind of work: divided as planned, and on the first slot alone."""

    divided_ms: float
    alone_ms: float

    @property
    def speedup(self) -> float:
        return self.alone_ms / self.divided_ms


class Fleet:
    """The compute slots with their workers. `primary` has the latents and combines what the others compute."""

    def __init__(self, slots: tuple[Slot, ...], maker: GraphMaker | None = None) -> None:
        """`maker`: records launches; by default CUDA graphs."""
        self.slots = slots
        maker = maker or CudaGraphs()
        self.recorder = StageRecorder(maker) if any(maker.can_record(slot.torch_device) for slot in slots) else None
        """Replays the launches of stages; None if no slot's device can."""
        self.speeds = SpeedBook()
        self.pieces = PieceBook()
        self.trials: dict[str, Trial] = {}
        self.is_divided = True
        """Whether to divide work at all. The latest sampling run sets it, and the decoding after it follows."""
        self._lost: set[int] = set()
        self._workers: dict[int, SlotWorker] = {}
        self._transport: Transport | None = None
        self._verdicts: Verdicts | None = None
        self._links_tested = False
        self._lock = threading.Lock()

    @property
    def primary(self) -> Slot:
        return self.slots[0]

    def slot(self, index: int) -> Slot:
        return next(slot for slot in self.slots if slot.index == index)

    def device(self, index: int) -> torch.device:
        return self.slot(index).torch_device

    @property
    def working_slots(self) -> tuple[Slot, ...]:
        """Slots that are not lost."""
        return tuple(slot for slot in self.slots if slot.index not in self._lost)

    def lose(self, index: int) -> None:
        """Give this slot no more work until the program restarts."""
        with self._lock:
            self._lost.add(index)

    def worker(self, index: int) -> SlotWorker:
        """The slot's worker. Its thread starts at the first call. Raises: SlotLost."""
        with self._lock:
            worker = self._workers.get(index)
            if worker is None:
                slot = self.slot(index)
                shared = Counter(one.torch_device for one in self.slots)[slot.torch_device] > 1
                worker = self._workers[index] = SlotWorker(slot, own_stream=shared)
        if worker.lost is not None:
            raise SlotLost(worker.slot, worker.lost.cause)
        return worker

    @property
    def transport(self) -> Transport:
        """The transport between the slots. The first access tests the links between CUDA devices in a subprocess."""
        with self._lock:
            if self._transport is None:
                self._transport = make_transport(self._find_verdicts(), self.slots)
            return self._transport

    @property
    def links(self) -> tuple[Link, ...]:
        """How fast tensors move between the working slots."""
        with self._lock:
            verdicts = self._find_verdicts()
        return measure_links(self.working_slots, verdicts)

    @property
    def verdicts(self) -> Verdicts:
        """Which pairs of cards may copy directly; empty with fewer than two cards."""
        with self._lock:
            return self._find_verdicts() or {}

    def _find_verdicts(self) -> Verdicts | None:
        """The caller holds the lock."""
        if not self._links_tested:
            self._verdicts, self._links_tested = _test_links(self.slots), True
        return self._verdicts

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


def _test_links(slots: tuple[Slot, ...]) -> Verdicts | None:
    if sum(slot.torch_device.type == "cuda" for slot in slots) < 2:
        return None
    from backend.devices.link_test import link_verdicts  # starts processes; only machines with two cards need it

    return link_verdicts(slots)


@dataclass(slots=True)
class _Current:
    fleet: Fleet | None = None
    store: MemoryStore | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_current = _Current()


def current_fleet() -> Fleet:
    """The fleet of the slots in memory management's current configuration. Closes the workers of an earlier configuration."""
    store = memory_management.current_store()
    with _current.lock:
        if _current.fleet is None or _current.store is not store:
            if _current.fleet is not None:
                _current.fleet.close()
            _current.fleet, _current.store = Fleet(memory_management.compute_slots()), store
            if _current.fleet.recorder is not None:
                store.add_spare(_current.fleet.recorder)
        return _current.fleet
