"""Moves a tensor from one slot's device to another's. Knows no plan, no network and no worker.

CUDA in short: a copy waits for the producing stream, runs on separate streams so that neither card stops computing, and the consuming stream
waits for it. `record_stream` keeps tensors alive for the streams that use them, so the caller need not. Two cards copy directly only if the link
test trusts the pair (`Verdict`); otherwise the copy goes through page-locked main memory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from backend import profiler
from backend.devices.links import Route, Verdict, Verdicts
from backend.devices.slot import Slot, canonical_device
from backend.devices.virtual_device import CopyCounter
from backend.profiler import NO_TIMER, NoTimer

DevicePair = tuple[torch.device, torch.device]

_HOST_LIKE = ("cpu", "vgpu")
_STAGE_CHUNK_BYTES = 4 * 2**20
"""A staged copy is split into chunks of this size, so that its second half can start before the first is complete."""


class TransportStats(CopyCounter):
    """Bytes and number of copies per ordered pair of devices. Tensors that stay on their device do not count."""


class Transfer(Protocol):
    """A tensor in transit, made by `Transport.ship`."""

    def receive(self) -> torch.Tensor:
        """The tensor on its target device, ready for the work that the calling thread enqueues next. Several threads may call it."""
        ...


class Transport(Protocol):
    """Moves tensors between devices."""

    stats: TransportStats

    def ship(self, tensor: torch.Tensor, target: torch.device) -> Transfer:
        """Start moving `tensor`. Call it in the thread that produced the tensor: the copy waits for that thread's current stream."""
        ...

    def send(self, tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
        """`ship` and `receive` in one thread: `tensor` on `target`, or the same object if it is already there."""
        ...


def make_transport(verdicts: Verdicts | None = None, slots: Sequence[Slot] = ()) -> Transport:
    """A transport that copies directly between cards that `verdicts` (by indexes of `slots`) trust. Without verdicts it trusts no pair."""
    device_of = {slot.index: slot.torch_device for slot in slots}
    trusted = {
        (device_of[source], device_of[target]): verdict
        for (source, target), verdict in (verdicts or {}).items()
        if source in device_of and target in device_of
    }
    return DeviceTransport(trusted)


def choose_route(source: torch.device, target: torch.device, verdicts: Mapping[DevicePair, Verdict]) -> Route:
    """The kind of copy between two devices; directly between cards only if a verdict says so. Pure."""
    if source == target:
        return "same"
    if source.type == "cpu" or target.type == "cpu" or (source.type in _HOST_LIKE and target.type in _HOST_LIKE):
        return "direct"
    verdict = verdicts.get((source, target))
    return "peer" if verdict is not None and verdict.route == "peer" else "staged"


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A tensor that is already there."""

    tensor: torch.Tensor

    def receive(self) -> torch.Tensor:
        return self.tensor


@dataclass(frozen=True, slots=True)
class _OnStream:
    """A tensor on a CUDA device that is complete once `event` has passed."""

    tensor: torch.Tensor
    event: Any
    cuda: Any

    def receive(self) -> torch.Tensor:
        stream = self.cuda.current_stream(self.tensor.device)
        stream.wait_event(self.event)
        self.tensor.record_stream(stream)
        return self.tensor


class DeviceTransport:
    """A transport for all kinds of devices that torch supports. Thread-safe."""

    def __init__(self, verdicts: Mapping[DevicePair, Verdict], cuda: Any = torch.cuda) -> None:
        self.stats = TransportStats()
        self._verdicts = dict(verdicts)
        self._cuda = CudaCopies(cuda)

    def send(self, tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
        return tensor if tensor.device == target else self.ship(tensor, target).receive()

    def ship(self, tensor: torch.Tensor, target: torch.device) -> Transfer:
        source, target = tensor.device, canonical_device(target)
        route = choose_route(source, target, self._verdicts)
        if route == "same":
            return self._cuda.share(tensor) if source.type == "cuda" else _Arrived(tensor)
        self.stats.add(str(source), str(target), tensor.nbytes)
        timer = profiler.recorder().time_copy(source, target, tensor.nbytes)
        if target.type == "cuda":
            return self._to_cuda(tensor, target, route, timer)
        # Wait for a copy to the host: the host reads without checking a stream.
        timer.start()
        arrived = tensor.to(target) if route == "direct" else tensor.to("cpu").to(target)
        timer.stop()
        return _Arrived(arrived)

    def _to_cuda(self, tensor: torch.Tensor, target: torch.device, route: Route, timer: NoTimer) -> Transfer:
        if tensor.device.type == "cuda":
            return self._cuda.copy(tensor, target, staged=route == "staged", timer=timer)
        return self._cuda.bring(tensor if route == "direct" else tensor.to("cpu"), target, timer)


@dataclass(slots=True)
class CudaCopies:
    """Copies between CUDA devices on separate streams, one per device and ordered pair. `cuda` is `torch.cuda`."""

    cuda: Any
    _streams: dict[tuple[torch.device, DevicePair], Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def share(self, tensor: torch.Tensor) -> Transfer:
        """A tensor for another stream on its own device. Nothing moves; the stream only waits for what was enqueued so far."""
        return _OnStream(tensor, self._mark(self.cuda.current_stream(tensor.device)), self.cuda)

    def bring(self, tensor: torch.Tensor, target: torch.device, timer: NoTimer = NO_TIMER) -> Transfer:
        """Copy from main memory. The caller waits for the copy unless the tensor is page-locked, but never for the card's computation."""
        in_stream = self._stream(target, (tensor.device, target))
        timer.start(in_stream)
        with self.cuda.stream(in_stream):
            arrived = tensor.to(target, non_blocking=tensor.is_pinned())
        timer.stop(in_stream)
        return _OnStream(arrived, self._mark(in_stream), self.cuda)

    def copy(self, tensor: torch.Tensor, target: torch.device, *, staged: bool, timer: NoTimer = NO_TIMER) -> Transfer:
        """Copy from card to card, directly or through main memory. Returns at once; the copy itself waits for the tensor's producer."""
        source = tensor.device
        out_stream, in_stream = self._stream(source, (source, target)), self._stream(target, (source, target))
        with self.cuda.device(source):
            dense = _make_dense(tensor)
            out_stream.wait_event(self._mark(self.cuda.current_stream(source)))
        with self.cuda.stream(in_stream):
            arriving = _new_like(dense, target)
        timer.start(out_stream)
        if staged:
            self._copy_staged(dense, arriving, out_stream, in_stream)
        else:
            self._copy_peer(dense, arriving, out_stream, in_stream)
        timer.stop(in_stream)
        dense.record_stream(out_stream)
        return _OnStream(arriving, self._mark(in_stream), self.cuda)

    def _copy_peer(self, source: torch.Tensor, target: torch.Tensor, out_stream: Any, in_stream: Any) -> None:
        """torch enqueues such a copy on the source's current stream and orders it with the target's current stream on both sides.

        Both are our copy streams here, so the copy neither waits for computation on the target nor delays it.
        """
        with self.cuda.stream(in_stream), self.cuda.stream(out_stream):
            target.copy_(source, non_blocking=True)

    def _copy_staged(self, source: torch.Tensor, target: torch.Tensor, out_stream: Any, in_stream: Any) -> None:
        """Copy chunk by chunk through page-locked memory. torch's host allocator keeps each chunk until the copies that use it are done."""
        for out_piece, in_piece in zip(_split_flat(source), _split_flat(target)):
            host = _new_pinned(out_piece)
            with self.cuda.stream(out_stream):
                host.copy_(out_piece, non_blocking=True)
            in_stream.wait_event(self._mark(out_stream))
            with self.cuda.stream(in_stream):
                in_piece.copy_(host, non_blocking=True)

    def _mark(self, stream: Any) -> Any:
        event = self.cuda.Event()
        event.record(stream)
        return event

    def _stream(self, device: torch.device, pair: DevicePair) -> Any:
        with self._lock:
            if (device, pair) not in self._streams:
                self._streams[device, pair] = self.cuda.Stream(device=device)
            return self._streams[device, pair]


def _make_dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its elements lie without gaps in an order that `empty_like` preserves, else a copy."""
    formats = [torch.contiguous_format] + ([torch.channels_last] if tensor.dim() == 4 else [])
    return tensor if any(tensor.is_contiguous(memory_format=one) for one in formats) else tensor.contiguous()


def _new_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(tensor, device=device)


def _new_pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def _split_flat(dense: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of a tensor's elements in memory order, each at most one chunk of a staged copy."""
    flat = dense.as_strided((dense.numel(),), (1,))
    return torch.split(flat, max(1, _STAGE_CHUNK_BYTES // dense.element_size())) if dense.numel() else ()
