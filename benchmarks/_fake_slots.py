"""Fake cards for counting bytes: torch's fake tensors on fake devices, with the product's executor and program, but no numbers.

A fake tensor has shape, type and device but no data, and mixing devices raises: a full-size split runs in seconds, and every byte is where it
would be.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backend.nn.controlnet import controlnet_config
from backend.nn.network_call import NetworkCall
from backend.nn.unet_program import Program, build_program
from backend.parallel.exchange.transport import DeviceTransport
from backend.parallel.placing.fleet import SpeedBook
from backend.parallel.planning.plan import ReplicaPlan
from backend.parallel.planning.profiling import CountFlops, FusedAttention
from backend.parallel.running.executor import Executor, Replica

DTYPE = torch.float16


def fake_device(slot: int) -> torch.device:
    """A device of an unused type; fake tensors need no kernels."""
    return torch.device("lazy", slot)


class DeviceBytes(TorchDispatchMode):
    """Live and peak bytes of every device, storage by storage."""

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[torch.device] = Counter()
        self.peak: Counter[torch.device] = Counter()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.charge(leaf)
        return result

    def charge(self, tensor: Tensor) -> None:
        storage, device = tensor.untyped_storage(), tensor.device
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.live[device] += storage.nbytes()
        self.peak[device] = max(self.peak[device], self.live[device])
        weakref.finalize(storage, self._release, storage._cdata, device, storage.nbytes())

    def _release(self, address: int, device: torch.device, num_bytes: int) -> None:
        self._known.discard(address)
        self.live[device] -= num_bytes


class FakeFleet:
    """The executor's interface to a fleet. Each slot has a thread; only one works at a time, as fake tensors are not thread-safe."""

    def __init__(self) -> None:
        self.mode, self.bytes, self.speeds = FakeTensorMode(allow_non_fake_inputs=True), DeviceBytes(), SpeedBook()
        self.transport = DeviceTransport({})
        self.recorder = None
        self._submitted, self._all_started, self._num_rows = 0, threading.Event(), 0
        self._workers: dict[int, _FakeWorker] = {}
        self._turn = threading.RLock()

    def device(self, slot: int) -> torch.device:
        return fake_device(slot)

    def worker(self, slot: int) -> _FakeWorker:
        return self._workers.setdefault(slot, _FakeWorker(self))

    def run(self, task: Callable[[], Any]) -> Any:
        """Run a task with fake tensors and count its bytes."""
        with self._turn:
            return self._run_counted(task)

    def run_rows(self, num_rows: int, call: Callable[[], Any]) -> Any:
        """A call of the executor: no slot starts before all its rows are queued."""
        self._submitted, self._num_rows = 0, num_rows
        self._all_started.clear()
        return self._run_counted(call)

    def wait_for_start(self) -> None:
        self._all_started.wait()

    def note_submitted(self) -> None:
        self._submitted += 1
        if self._submitted >= self._num_rows:
            self._all_started.set()

    def _run_counted(self, task: Callable[[], Any]) -> Any:
        with ExitStack() as stack:
            for one in (torch.no_grad(), self.mode, self.bytes, FusedAttention(CountFlops(nn.Module()))):
                stack.enter_context(one)
            return task()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


class _FakeWorker:
    """Runs tasks in order."""

    def __init__(self, fleet: FakeFleet) -> None:
        self._fleet = fleet
        self._tasks: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], Any], priority: object = ()) -> Future[Any]:
        future: Future[Any] = Future()
        self._tasks.put((task, future))
        self._fleet.note_submitted()
        return future

    def close(self) -> None:
        self._tasks.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (entry := self._tasks.get()) is not None:
            self._fleet.wait_for_start()
            task, future = entry
            try:
                future.set_result(self._fleet.run(task))
            except (RuntimeError, AttributeError, TypeError, AssertionError) as error:  # an end of this thread would leave the caller waiting
                future.set_exception(error)
            del entry, task, future


class FakeModel:
    """A UNet cut by a plan, the other networks as weights, and optionally a ControlNet, on fake devices."""

    def __init__(self, unet_config: Mapping[str, Any], plan: ReplicaPlan, *, controlnet_slot: int | None, other_bytes: Mapping[int, int]) -> None:
        self.fleet, self.plan = FakeFleet(), plan
        self.home = fake_device(0)
        with torch.device("meta"):
            self.unet = UNet2DConditionModel.from_config(dict(unet_config)).eval()
            self.controlnet = None if controlnet_slot is None else ControlNetModel(**controlnet_config(self.unet)).eval()
        self.program: Program = build_program(self.unet)
        self.weight_bytes: Counter[int] = Counter()
        self.fleet.run(lambda: self._place(controlnet_slot, other_bytes))

    def _place(self, controlnet_slot: int | None, other_bytes: Mapping[int, int]) -> None:
        for layer in self.program.embedding.named_layers:
            self.weight_bytes[self.plan.slots[0]] += _materialize(layer[1], fake_device(self.plan.slots[0]))
        for piece, slot in zip(self.plan.pieces, self.plan.slots):
            for _, layer in self.program.piece_layers(piece):
                self.weight_bytes[slot] += _materialize(layer, fake_device(slot))
        if self.controlnet is not None and controlnet_slot is not None:
            _materialize(self.controlnet, fake_device(controlnet_slot))
            self.controlnet_device = fake_device(controlnet_slot)
        self.others = [torch.empty(num_bytes, dtype=torch.uint8, device=fake_device(slot)) for slot, num_bytes in other_bytes.items()]

    def step(self, *, num_rows: int, latent_side: int, steps: int = 2) -> int:
        """Run steps of the network for this many rows; returns the bytes that crossed in the last one."""
        executor = Executor((Replica(program=self.program, plan=self.plan),), self.fleet, deal=lambda rows: (rows,), asynchronous=False)  # type: ignore[arg-type]
        for _ in range(steps):
            before = sum(self.fleet.transport.stats.bytes_by_pair().values())
            call = self.fleet.run(lambda: self._make_call(num_rows, latent_side))
            self.fleet.run_rows(num_rows, partial(executor.run, call))
        executor.close()
        return sum(self.fleet.transport.stats.bytes_by_pair().values()) - before

    def _make_call(self, num_rows: int, side: int) -> NetworkCall:
        config, home = self.unet.config, self.home
        x_BCHW = torch.empty(num_rows, config.in_channels, side, side, device=home, dtype=DTYPE)
        context_BLD = torch.empty(num_rows, 77, config.cross_attention_dim, device=home, dtype=DTYPE)
        y_BV = torch.empty(num_rows, config.projection_class_embeddings_input_dim, device=home, dtype=DTYPE)
        timesteps_B = torch.empty(num_rows, device=home)
        control = None if self.controlnet is None else self._run_controlnet(x_BCHW, timesteps_B, context_BLD)
        return NetworkCall(rows={"x": x_BCHW, "timesteps": timesteps_B, "context": context_BLD, "y": y_BV}, control=control)

    def _run_controlnet(self, x_BCHW: Tensor, timesteps_B: Tensor, context_BLD: Tensor) -> dict[str, Sequence[Tensor | None]]:
        """Row by row, like a card with little memory."""
        side, device = x_BCHW.shape[-1], self.controlnet_device
        hint_BCHW = torch.empty(1, 3, 8 * side, 8 * side, device=device, dtype=DTYPE)
        extra = {"text_embeds": torch.empty(1, 1280, device=device, dtype=DTYPE), "time_ids": torch.empty(1, 6, device=device)}
        rows = []
        for row in range(x_BCHW.shape[0]):
            part = slice(row, row + 1)
            down, middle = self.controlnet(x_BCHW[part], timesteps_B[part], context_BLD[part], hint_BCHW, added_cond_kwargs=extra, return_dict=False)
            rows.append((*down, middle))
        *outputs, middle_BCHW = (torch.cat(same) for same in zip(*rows))
        return {"output": outputs, "middle": [middle_BCHW]}


def _materialize(network: nn.Module, device: torch.device) -> int:
    """Put half-precision weights on that device; returns their bytes."""
    num_bytes = 0
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            weight = torch.empty(parameter.shape, dtype=DTYPE, device=device)
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)
            num_bytes += weight.nbytes
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return num_bytes
