"""Copies of tensors that run while the slots compute. Knows no network and no plan."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.parallel.exchange.transport import Transfer
from backend.parallel.placing.fleet import Fleet
from backend.parallel.running.failures import blaming


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """A tensor that stays on its slot until the same slot needs it again."""

    tensor: Tensor

    def receive(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True, slots=True)
class Copying:
    """A tensor that a copier thread is copying."""

    future: Future[Tensor]

    def receive(self) -> Tensor:
        return self.future.result()


class Copiers:
    """Sends tensors to slots. CUDA copies overlap with computation by themselves. For other devices, one thread per source does the copying, so
    that a slow link does not delay computation.

    `asynchronous`: if False, each copy is waited for where it starts.
    """

    def __init__(self, fleet: Fleet, *, asynchronous: bool) -> None:
        self._fleet, self._asynchronous = fleet, asynchronous
        self._by_device: dict[torch.device, ThreadPoolExecutor] = {}
        self._lock = threading.Lock()

    def ship(self, tensor: Tensor, slot: int) -> Transfer:
        """Start a copy to a slot's device. Raises: SlotFailure of that slot if it runs out of memory, here or in `receive`."""
        target, transport = self._fleet.device(slot), self._fleet.transport
        if tensor.device == target or not self._asynchronous or "cuda" in (tensor.device.type, target.type):
            return blaming(slot, lambda: transport.ship(tensor, target))
        return self._copy(tensor.device, lambda: blaming(slot, lambda: transport.send(tensor, target)))

    def _copy(self, source: torch.device, run: Callable[[], Tensor]) -> Copying:
        with self._lock:
            pool = self._by_device.get(source)
            if pool is None:
                pool = self._by_device[source] = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"copy-{source}")
        return Copying(pool.submit(_without_gradients, run))

    def close(self) -> None:
        with self._lock:
            for pool in self._by_device.values():
                pool.shutdown(wait=False)
            self._by_device.clear()


def _without_gradients(run: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return run()


def when_arrived(transfers: Iterable[Transfer], then: Callable[[BaseException | None], None]) -> None:
    """Call `then(failure or None)` once no copier is working on the transfers: on the thread that finishes the last, or immediately on this one."""
    copying = [transfer.future for transfer in transfers if isinstance(transfer, Copying)]
    if not copying:
        then(None)
        return
    left, lock = len(copying), threading.Lock()

    def count_down(_: object) -> None:
        nonlocal left
        with lock:
            left -= 1
            is_last = left == 0
        if is_last:
            failure = next((failure for future in copying if (failure := future.exception()) is not None), None)
            copying.clear()  # a future keeps its callbacks, and with this list itself, alive
            then(failure)

    for future in tuple(copying):
        future.add_done_callback(count_down)
