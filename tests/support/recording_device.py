"""A device that records operations on the CPU and repeats them on the same tensors, as a card replays a graph of launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
Operation = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class _Recording(TorchDispatchMode):
    """Notes every operation; refuses what a card cannot do while it records."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result


class _Graph:
    num_bytes = 1000

    def __init__(self, operations: list[Operation]) -> None:
        self._operations = operations
        self.num_replays = 0

    def replay(self) -> None:
        """Repeat the operations on the recorded tensors; results go where the recorded results are. Views follow by themselves."""
        self.num_replays += 1
        for func, args, kwargs, result in self._operations:
            again = func(*args, **kwargs)
            for old, new in zip(*(one if isinstance(one, (list, tuple)) else [one] for one in (result, again))):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordingDevice:
    """Records on the CPU. `graphs` are all it made; `short` makes it run out of memory; `busy_ms` is the device's time between any two marks."""

    def __init__(self, busy_ms: float | None = None) -> None:
        self.graphs: list[_Graph] = []
        self.short = False
        self.busy_ms = busy_ms

    def mark(self, device: torch.device) -> object:
        return object()

    def ms_between(self, start: object, end: object) -> float | None:
        assert start is not None and end is not None
        return self.busy_ms

    def can_record(self, device: torch.device) -> bool:
        return device == CPU

    def record(self, run: Callable[[], None], device: torch.device) -> _Graph:
        if self.short:
            raise torch.OutOfMemoryError("made up")
        with _Recording() as recording:
            run()
        self.graphs.append(_Graph(recording.operations))
        return self.graphs[-1]
