"""One model on one device: a weak reference to it, its bytes, and loading and unloading. Knows no budgets and no other models."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from backend.devices.slot import canonical_device
from backend.memory.module_bytes import count_bytes_on, move_module
from backend.memory.streaming import StreamedModel, start_streaming, stop_streaming

logger = logging.getLogger(__name__)


@runtime_checkable
class Placeable(Protocol):
    """What the store requires of a model patcher.

    It may also have `prepare_load(device)`, which gives weights to a network without any, `must_be_whole`, which means that it cannot stream,
    `weight_budget_bytes`, the room for its weights that a plan chose (the rest streams; whole if there is room anyway),
    `forge_patch_model(device)`, `forge_unpatch_model(device)`, `model_patches_to(device)` and `refresh_loras()`.
    """

    model: Any
    load_device: torch.device
    offload_device: torch.device
    current_device: torch.device


class LoadedModel:
    """A model that the store has placed. It has only weak references: when nobody else keeps the model, the entry is dead and its bytes are free."""

    def __init__(self, model: Placeable) -> None:
        self._patcher = weakref.ref(model)
        self._module: weakref.ref[nn.Module] = weakref.ref(model.model)
        self.name = type(model.model).__name__
        self.device = canonical_device(model.load_device)
        self.offload_device = canonical_device(model.offload_device)
        self.model_accelerated = False
        self.inclusive_memory = 0
        self.exclusive_memory = 0
        self.streamed: StreamedModel | None = None

    @property
    def model(self) -> Placeable | None:
        """The patcher, while it exists."""
        return self._patcher()

    @property
    def real_model(self) -> nn.Module | None:
        """The network, while it exists."""
        return self._module()

    @property
    def is_alive(self) -> bool:
        return self._module() is not None

    def holds(self, model: Placeable) -> bool:
        """Whether this is the entry for this patcher's network on this patcher's device."""
        return self._module() is model.model and self.device == canonical_device(model.load_device)

    def adopt(self, model: Placeable) -> None:
        """Switch to another patcher of the same network. Undoes what the previous patcher swapped in the network."""
        if self._patcher() is not model:
            self._patcher = weakref.ref(model)
            self._call("forge_unpatch_model", None)

    def compute_inclusive_exclusive_memory(self) -> None:
        """Recount the bytes on the device and the bytes not on it."""
        module = self._module()
        total_bytes, self.inclusive_memory = count_bytes_on(module, self.device) if module is not None else (0, 0)
        self.exclusive_memory = total_bytes - self.inclusive_memory

    def model_load(self, model_gpu_memory_when_using_cpu_swap: int = -1, *, pin: bool = False, ahead: bool = False) -> nn.Module | None:
        """Load the network: whole with -1, else that many bytes, streaming the rest (from page-locked memory, or ahead of use)."""
        module = self._module()
        if module is None:
            return None
        budget_bytes = model_gpu_memory_when_using_cpu_swap
        self._stop_streaming()
        self._call("prepare_load", self.device)
        if budget_bytes < 0:
            move_module(module, self.device)
        else:
            self.streamed = start_streaming(module, self.device, budget_bytes, pin=pin, ahead=ahead)
        self.model_accelerated = budget_bytes >= 0
        self._set_current_device(self.device)
        self.apply_patches()
        return module

    def apply_patches(self) -> None:
        """Apply the patcher to the network where it is: swap attributes, move hooks, merge LoRAs."""
        self._call("forge_patch_model", None)
        self._call("model_patches_to", self.device)
        self._call("refresh_loras")
        self.compute_inclusive_exclusive_memory()

    def model_unload(self, avoid_model_moving: bool = False) -> None:
        """Take the network off the device. With `avoid_model_moving`, only undo what loading added."""
        module = self._module()
        self._stop_streaming()
        self.model_accelerated = False
        self._call("forge_unpatch_model", None)
        if module is None or avoid_model_moving:
            return
        self._call("model_patches_to", self.offload_device)
        move_module(module, self.offload_device)
        self._set_current_device(self.offload_device)
        self.compute_inclusive_exclusive_memory()

    def _stop_streaming(self) -> None:
        if self.streamed is not None:
            stop_streaming(self.streamed)
            self.streamed = None

    def _set_current_device(self, device: torch.device) -> None:
        patcher = self._patcher()
        if patcher is not None:
            patcher.current_device = device

    def _call(self, name: str, *args: object) -> None:
        method: Callable[..., object] | None = getattr(self._patcher(), name, None)
        if method is not None:
            method(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoadedModel) and self.model is not None and self.model is other.model

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        streamed = f", {self.streamed.streamed_bytes / 2**20:.0f} MiB streamed" if self.streamed else ""
        return f"<{self.name} on {self.device}: {self.inclusive_memory / 2**20:.0f} MiB{streamed}>"
