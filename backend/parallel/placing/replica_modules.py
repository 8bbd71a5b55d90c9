"""Replica modules: copies of a network on other slots, with the same names of parameters and the same changes of weights.

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
    """Replica modules of one network, by where they are for. Kept by the network's owner, used again by later runs."""

    @property
    def networks(self) -> set[nn.Module]:
        """All that memory management knows of them by."""
        return {patcher.model for patcher in self.values()}


class ReplicaPatcher(ModelPatcher):
    """A copy of a network for another slot. It holds weights only while it is on a device: it leaves by forgetting them.

    Changes of weights are asked for with `copy_patches_from` and made by `refresh_replica`, which the slot's worker runs.
    """

    must_be_whole = True
    _source: weakref.ref[ModelPatcher]

    @property
    def source(self) -> ModelPatcher:
        """The patcher whose network this copies. Held weakly: the network keeps its replica modules, not the other way round."""
        source = self._source()
        if source is None:
            raise RuntimeError(f"The network that a copy on {self.load_device} belongs to is gone. Copies are placed anew for every run.")
        return source

    @source.setter
    def source(self, patcher: ModelPatcher) -> None:
        self._source = weakref.ref(patcher)

    @classmethod
    def make(cls, source: ModelPatcher, empty: nn.Module, device: torch.device) -> ReplicaPatcher:
        """A copy without weights. `empty` is a network like the source's with the same names, on the meta device."""
        made = cls(empty, load_device=device, offload_device=META, current_device=META)
        made.size = source.model_size()
        made.source = source
        return made

    def prepare_load(self, device: torch.device) -> None:
        self.fill(self.model, device)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def fill(self, part: nn.Module, device: torch.device) -> None:
        """Copy the source's weights, as they were made, for those tensors of `part` that have none. Raises: torch.OutOfMemoryError."""
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
        """Left to `refresh_replica`, so that all devices change their weights at once."""

    def refresh_replica(self) -> None:
        """Have the weights as the source's patcher wants them."""
        self.copy_patches_from(self.source)
        super().refresh_loras()
