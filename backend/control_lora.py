"""Control-LoRAs: ControlNets stored as low-rank differences from the encoder of the checkpoint they are used with.

A file contains, under the original layout's names, `X.up` and `X.down` for a layer X (its weight is the checkpoint's plus up @ down), and full
tensors for layers that a UNet lacks or that were trained fully. It becomes a ControlNet when the checkpoint is known. Must not know pages or jobs.

Shapes: O a layer's outputs, I its inputs times kernel positions, R rank.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from backend.checkpoint_config import controlnet_fields, hint_widths
from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.control_dtype import pick_dtype
from backend.key_layout import controlnet_module_names, rename_by_module
from backend.modules.k_model import KModel
from backend.nn.controlnet import ControlNetwork
from backend.patcher.controlnet import ControlBase, ControlNet, ControlNetError, family_of
from backend.patcher.weight_patches import unpatched_tensors
from backend.state_dict import build_empty

logger = logging.getLogger(__name__)

MARK = "lora_controlnet"


def is_control_lora(keys: Collection[str]) -> bool:
    """Whether these are tensor names of a Control-LoRA."""
    return MARK in keys or any(key.startswith("input_blocks.") and key.endswith(".down") for key in keys)


def read_control_lora(file: TensorFile) -> ControlLora:
    """The chain link for a Control-LoRA's file. Raises: CheckpointError for an incomplete file."""
    widths = hint_widths(file, Part("", Layout.LDM))
    tensors = {key: file.read(key) for key in file.infos if key != MARK}
    halves = [key for key in tensors if key.endswith((".up", ".down"))]
    alone = next((key for key in halves if _other_half(key) not in tensors), None)
    if alone is not None:
        raise CheckpointError(f"{file.path.name}: is a Control-LoRA with {alone} but without {_other_half(alone)}; download it again.")
    link = ControlLora(tensors, widths)
    link.name = file.path.name
    rank = max((tensors[key].shape[0] for key in halves if key.endswith(".down")), default=0)
    logger.info("Loaded %s: a Control-LoRA of rank %d, which becomes a ControlNet with the checkpoint's encoder.", file.path.name, rank)
    return link


def _other_half(key: str) -> str:
    return key.removesuffix("up") + "down" if key.endswith(".up") else key.removesuffix("down") + "up"


class ControlLora(ControlBase):
    """Builds a ControlNet for a checkpoint. The one built last is kept as long as its checkpoint exists.

    `control_weights` are the file's tensors, on the host. `hint_channels`: the hint's channels, then the widths of the hint embedding's levels.
    """

    def __init__(self, control_weights: Mapping[str, Tensor], hint_channels: tuple[int, ...], device: torch.device | None = None) -> None:
        super().__init__(device)
        self.control_weights = control_weights
        self.hint_channels = hint_channels
        self._built: WeakKeyDictionary[KModel, ControlNet] = WeakKeyDictionary()

    def copy(self) -> ControlLora:
        """The same tensors with the same settings, not in a chain."""
        other = ControlLora(self.control_weights, self.hint_channels, self.device)
        other._built = self._built
        self.copy_to(other)
        return other

    def copy_for(self, model: KModel) -> ControlNet:
        """A ControlNet built on the denoiser's encoder without its LoRAs. Raises: ControlNetError for a denoiser of another family."""
        found = self._built.get(model)
        if found is None:
            self._built.clear()
            found = self._built[model] = ControlNet(ControlNetwork(self._build(model)))
        link = found.copy()
        self.copy_to(link)
        return link

    def _build(self, model: KModel) -> ControlNetModel:
        config = model.diffusion_model.config
        channels, *widths = self.hint_channels
        fields = {**controlnet_fields(config), "in_channels": 4, "conditioning_channels": channels, "conditioning_embedding_out_channels": widths}
        if not isinstance(fields["layers_per_block"], int):
            raise ControlNetError(
                f"{self.name} cannot be used with this checkpoint, whose levels have different numbers of resnets. Choose another checkpoint."
            )
        network = build_empty(lambda: ControlNetModel(**fields))
        names = controlnet_module_names(network.config)
        dtype, base = pick_dtype(network), unpatched_tensors(model)
        used: set[str] = set()
        with torch.no_grad():
            for key, target in list(network.state_dict().items()):
                value = self._make_tensor(rename_by_module(key, names), base.get(f"diffusion_model.{key}"), target.shape, used)
                owner, _, leaf = key.rpartition(".")
                setattr(network.get_submodule(owner), leaf, nn.Parameter(value.to("cpu", dtype, copy=True), requires_grad=False))
        self._refuse_leftovers(used, config)
        return network

    def _make_tensor(self, name: str, base: Tensor | None, shape: torch.Size, used: set[str]) -> Tensor:
        """The tensor with this original name: the file's or the checkpoint's, plus up @ down. `used` collects the file's keys."""
        layer, _, leaf = name.rpartition(".")
        whole, low, high = self.control_weights.get(name), f"{layer}.down", f"{layer}.up"
        if whole is not None:
            used.add(name)
        else:
            whole = base
        if whole is None:
            raise ControlNetError(f"{self.name} lacks {name}, and so does the checkpoint in use. Download the file again.")
        whole = whole[:, : shape[1]] if whole.ndim == 4 else whole  # an inpainting model's first layer reads mask and picture behind the latents
        if leaf != "weight" or low not in self.control_weights:
            return self._checked(whole, name, shape)
        used |= {low, high}
        up_OR, down_RI = self.control_weights[high].flatten(1).float(), self.control_weights[low].flatten(1).float()
        if up_OR.shape[0] != shape[0] or down_RI.shape[1] != shape[1:].numel() or up_OR.shape[1] != down_RI.shape[0]:
            raise ControlNetError(self._misfit(f"{low} is {tuple(self.control_weights[low].shape)}", f"a layer of {tuple(shape)}"))
        return self._checked(whole, name, shape).to("cpu", torch.float32) + (up_OR @ down_RI).view(shape)

    def _checked(self, tensor: Tensor, name: str, shape: torch.Size) -> Tensor:
        if tensor.numel() != shape.numel():
            raise ControlNetError(self._misfit(f"{name} is {tuple(tensor.shape)}", f"{tuple(shape)}"))
        return tensor.reshape(shape)

    def _misfit(self, own: str, theirs: str) -> str:
        return (
            f"{self.name} does not fit the checkpoint in use: its {own}, but the checkpoint has {theirs} there. "
            "Choose a Control-LoRA of the checkpoint's family."
        )

    def _refuse_leftovers(self, used: Collection[str], config: Any) -> None:
        left = [key for key in self.control_weights if key not in used]
        if left:
            raise ControlNetError(
                f"{self.name} does not fit the checkpoint in use: {len(left)} of its {len(self.control_weights)} tensors (first: {left[0]}) do not "
                f"exist in a ControlNet for {family_of(config)}. Choose a Control-LoRA of the checkpoint's family."
            )
