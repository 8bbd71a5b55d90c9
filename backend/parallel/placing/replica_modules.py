"""Replica modules: copies of a network on other slots, with the same parameter names and the same weight patches.

Must not know what the network is for.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable

import torch
from torch import nn

from backend.memory.module_bytes import as_same_kind
from backend.nn.empty_network import META as META
from backend.patcher.base import ModelPatcher
from backend.patcher.weight_patches import unpatched_tensors
from backend.storage.kinds import storage_of


class ReplicaModules(dict[Hashable, "ReplicaPatcher"]):
    """Replica modules of one network, by place. The network's owner keeps them for later runs."""

    @property
    def networks(self) -> set[nn.Module]:
        """The modules under which memory management knows the replica modules."""
        return {patcher.model for patcher in self.values()}


class ReplicaPatcher(ModelPatcher):
    """A copy of a network for another slot. It has weights only while it is on a device; when it is unloaded it drops them.

    `copy_patches_from` requests weight patches; `refresh_replica`, which the slot's worker runs, applies them.
    """

    must_be_whole = True
    _source: weakref.ref[ModelPatcher]

    @property
    def source(self) -> ModelPatcher:
        """The patcher whose network this copies. A weak reference: the network keeps its replica modules alive, not the other way around."""
        source = self._source()
        if source is None:
            raise RuntimeError(f"A copy on {self.load_device} was used after its network was deleted. Place copies again for every run.")
        return source

    @source.setter
    def source(self, patcher: ModelPatcher) -> None:
        self._source = weakref.ref(patcher)

    @classmethod
    def make(cls, source: ModelPatcher, empty: nn.Module, device: torch.device) -> ReplicaPatcher:
        """A copy without weights. `empty` is a network of the same kind with the same names, on the meta device."""
        made = cls(empty, load_device=device, offload_device=META, current_device=META)
        made.size = source.model_size()
        made.source = source
        return made

    def prepare_load(self, device: torch.device) -> None:
        self.fill(self.model, device)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def fill(self, part: nn.Module, device: torch.device) -> None:
        """Copy the source's unpatched weights into those tensors of `part` that have none. Raises: torch.OutOfMemoryError."""
        empty = {id(tensor) for tensor in (*part.parameters(), *part.buffers()) if tensor.device == META}
        if not empty:
            return
        self.lora_loader.restore()
        originals = unpatched_tensors(self.source.model)
        placed: dict[int, torch.Tensor] = {}
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            for registry in (module._parameters, module._buffers):
                for name, tensor in registry.items():
                    if tensor is None or id(tensor) not in empty:
                        continue
                    if id(tensor) not in placed:
                        original = originals[f"{prefix}.{name}" if prefix else name]
                        placed[id(tensor)] = as_same_kind(storage_of(original).to(device, copy=True).tensor, tensor)
                    registry[name] = placed[id(tensor)]

    def refresh_loras(self) -> None:
        """Does nothing: `refresh_replica` does it, so that all devices patch their weights at once."""

    def refresh_replica(self) -> None:
        """Patch the weights like the source's."""
        self.copy_patches_from(self.source)
        super().refresh_loras()
