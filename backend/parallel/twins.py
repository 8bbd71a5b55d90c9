"""Twins: copies of a network on other slots, with the same names of parameters and the same changes of weights.

Must not know what the network is for.
"""

from __future__ import annotations

import weakref

import torch
from torch import nn

from backend.memory.module_bytes import as_same_kind
from backend.patcher.base import ModelPatcher
from backend.patcher.weight_patches import unpatched_tensors
from backend.storage.kinds import storage_of

META = torch.device("meta")


class TwinPatcher(ModelPatcher):
    """A copy of a network for another slot. It holds weights only while it is on a device: it leaves by forgetting them.

    Changes of weights are asked for with `copy_patches_from` and made by `refresh_twin`, which the slot's worker runs.
    """

    must_be_whole = True
    _source: weakref.ref[ModelPatcher]

    @property
    def source(self) -> ModelPatcher:
        """The patcher whose network this copies. Held weakly: the network keeps its twins, not the other way round."""
        source = self._source()
        if source is None:
            raise RuntimeError(f"The network that a copy on {self.load_device} belongs to is gone. Copies are placed anew for every run.")
        return source

    @source.setter
    def source(self, patcher: ModelPatcher) -> None:
        self._source = weakref.ref(patcher)

    @classmethod
    def make(cls, source: ModelPatcher, empty: nn.Module, device: torch.device) -> TwinPatcher:
        """A twin without weights. `empty` is a network like the source's with the same names, on the meta device."""
        twin = cls(empty, load_device=device, offload_device=META, current_device=META)
        twin.size = source.model_size()
        twin.source = source
        return twin

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
        """Left to `refresh_twin`, so that all devices change their weights at once."""

    def refresh_twin(self) -> None:
        """Have the weights as the source's patcher wants them."""
        self.copy_patches_from(self.source)
        super().refresh_loras()
