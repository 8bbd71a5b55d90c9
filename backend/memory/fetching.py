"""How a streamed layer's weights get to the device: when the layer runs, or one layer ahead while the device computes.

`AheadFetcher` decides and knows no streams; `CudaAheadCopies` does the CUDA part. Neither knows networks or budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Fetcher(Protocol):
    """Called before and after each streamed layer runs, always by the thread that runs the network."""

    layers_in_flight: int
    """How many streamed layers may be on the device at once."""

    def fetch(self, layer: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors on the device, in order, ready for the work that the calling thread enqueues next."""
        ...

    def release(self, layer: str, *, has_failed: bool) -> None:
        """The layer's work has been enqueued or has failed. Nobody references the fetched tensors any more."""
        ...


@dataclass(slots=True)
class DirectFetcher:
    """Copies weights when their layer runs, on the computing stream."""

    device: torch.device
    layers_in_flight: int = 1

    def fetch(self, layer: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [_copy_to(tensor, self.device) for tensor in tensors]

    def release(self, layer: str, *, has_failed: bool) -> None:
        """Does nothing: the stream frees the fetched tensors in order."""


class AheadCopies(Protocol):
    """Copies that overlap with computation."""

    def begin(self, tensors: Sequence[Tensor]) -> Any:
        """Start copying. Raises: torch.OutOfMemoryError."""
        ...

    def finish(self, copy: Any) -> list[Tensor]:
        """The copies. Work that the calling thread enqueues next waits for them."""
        ...

    def mark(self) -> Any:
        """A mark after everything that the calling thread has enqueued."""
        ...

    def wait(self, mark: Any) -> None:
        """Wait until the device has passed the mark."""
        ...


class _Version(NamedTuple):
    """A tensor and its version when its copy began."""

    tensor: Tensor
    version: int

    def is_still(self, tensor: Tensor) -> bool:
        return self.tensor is tensor and self.version == _version(tensor)


@dataclass(frozen=True, slots=True)
class _Coming:
    layer: str
    sources: tuple[_Version, ...]
    copy: Any

    def is_of(self, layer: str, tensors: Sequence[Tensor]) -> bool:
        same = self.layer == layer and len(tensors) == len(self.sources)
        return same and all(source.is_still(tensor) for source, tensor in zip(self.sources, tensors))


@dataclass(slots=True)
class AheadFetcher:
    """While one layer computes, copies the weights of the layer that followed it last time.

    The first layer of a pass is never copied ahead, because weights may change between passes. A wrong guess or changed weights only cost a
    copy. The host waits for the layer before the one that computes, so at most two layers are on the device, however far the host runs ahead.
    """

    tensors_of: Callable[[str], Sequence[Tensor]]
    copies: AheadCopies
    layers_in_flight: int = 2
    _next: dict[str, str] = field(default_factory=dict)
    _first: str | None = None
    _last: str | None = None
    _coming: _Coming | None = None
    _computing: Any = None

    def fetch(self, layer: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        coming, self._coming = self._coming, None
        self._learn(layer)
        if coming is not None and coming.is_of(layer, tensors):
            return self.copies.finish(coming.copy)
        del coming  # free its memory
        self._let_compute(None)
        return self.copies.finish(self.copies.begin(tensors))

    def release(self, layer: str, *, has_failed: bool) -> None:
        if has_failed:
            self._coming = self._last = None
            return
        self._let_compute(self.copies.mark())
        following = self._next.get(layer)
        if following is not None and self._coming is None:
            self._coming = self._begin(following)

    def _learn(self, layer: str) -> None:
        if self._first is None:
            self._first = layer
        elif self._last is not None and layer != self._first:
            self._next[self._last] = layer
        self._last = layer

    def _let_compute(self, mark: Any) -> None:
        """Wait for the previous layer's work. After that only the work up to `mark` may still be running."""
        before, self._computing = self._computing, mark
        if before is not None:
            self.copies.wait(before)

    def _begin(self, layer: str) -> _Coming | None:
        """Start copying a layer's weights. None if there is no room: the layer is then fetched when it runs, with recovery."""
        tensors = self.tensors_of(layer)
        try:
            copy = self.copies.begin(tensors)
        except torch.OutOfMemoryError:
            return None
        return _Coming(layer, tuple(_Version(tensor, _version(tensor)) for tensor in tensors), copy)


@dataclass(slots=True)
class CudaAheadCopies:
    """Copies on a separate stream. `cuda` is `torch.cuda`."""

    device: torch.device
    cuda: Any = torch.cuda
    _stream: Any = None

    def begin(self, tensors: Sequence[Tensor]) -> Any:
        """Start copying. From page-locked memory the copy is asynchronous; from other memory the host waits for it."""
        if self._stream is None:
            self._stream = self.cuda.Stream(device=self.device)
        with self.cuda.stream(self._stream):
            arriving = [_copy_to(tensor, self.device) for tensor in tensors]
        event = self.cuda.Event()
        event.record(self._stream)
        return arriving, event

    def finish(self, copy: Any) -> list[Tensor]:
        """The memory belongs to the copy stream, so this tells the allocator which stream uses it now."""
        arriving, event = copy
        stream = self.cuda.current_stream(self.device)
        stream.wait_event(event)
        for tensor in arriving:
            tensor.record_stream(stream)
        return list(arriving)

    def mark(self) -> Any:
        event = self.cuda.Event()
        event.record(self.cuda.current_stream(self.device))
        return event

    def wait(self, mark: Any) -> None:
        mark.synchronize()


def is_pinned(tensor: Tensor) -> bool:
    return torch.cuda.is_available() and tensor.device.type == "cpu" and tensor.is_pinned()


def _copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, non_blocking=is_pinned(tensor))


def _version(tensor: Tensor) -> int:
    """The count of in-place changes. Tensors made in inference mode have none and count as unchanged."""
    return 0 if tensor.is_inference() else tensor._version
