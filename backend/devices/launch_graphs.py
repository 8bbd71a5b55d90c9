"""What a device can record and launch again as one: CUDA graphs. Knows no networks and no plans.

A recording holds the kernels with their addresses. It reads its inputs from, and writes its results to, the tensors that were used while it was
recorded; whoever replays it fills and reads those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class LaunchGraph(Protocol):
    """Recorded launches. `num_bytes`: memory that they hold on the device, results included."""

    @property
    def num_bytes(self) -> int: ...

    def replay(self) -> None:
        """Launch everything again, in the calling thread's current stream."""
        ...


class GraphMaker(Protocol):
    """Records launches."""

    def can_record(self, device: torch.device) -> bool:
        """Whether launches on this device can be recorded."""
        ...

    def record(self, run: Callable[[], None], device: torch.device) -> LaunchGraph:
        """Record what `run` launches in the calling thread; other threads may launch meanwhile. Its kernels must have run before, so that
        libraries are set up. Raises: RuntimeError if `run` waits for the device, and torch.OutOfMemoryError."""
        ...

    def mark(self, device: torch.device) -> Any:
        """A point in the work of the calling thread's current stream."""
        ...

    def ms_between(self, start: Any, end: Any) -> float | None:
        """The device's time between two marks; None if it has not passed them yet. Never waits."""
        ...


class _CudaGraph:
    def __init__(self, graph: Any, num_bytes: int) -> None:
        self._graph, self.num_bytes = graph, num_bytes

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphs:
    """CUDA graphs. Each has memory of its own, as results of one are read while another is replayed. Not run on a card yet."""

    def can_record(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def record(self, run: Callable[[], None], device: torch.device) -> LaunchGraph:
        cuda: Any = torch.cuda
        with cuda.device(device):
            before_bytes = cuda.memory_reserved(device)
            graph = cuda.CUDAGraph()
            # recording needs a stream other than the default; "thread_local": other slots' workers keep launching
            with cuda.graph(graph, stream=cuda.Stream(device=device), capture_error_mode="thread_local"):
                run()
            return _CudaGraph(graph, max(0, cuda.memory_reserved(device) - before_bytes))

    def mark(self, device: torch.device) -> Any:
        event_type: Any = torch.cuda.Event
        event = event_type(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def ms_between(self, start: Any, end: Any) -> float | None:
        return float(start.elapsed_time(end)) if start is not None and end.query() else None
