"""From a ControlNet's file to a link that can be put into a chain. The keys tell the kind and the family, never the file's name.

Must not know pages, jobs or where files are listed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
from diffusers import ControlNetModel
from torch import Tensor

from backend import checkpoint_config, checkpoint_identity, memory_management
from backend.checkpoint_file import CheckpointError, TensorFile, TensorInfo, open_tensor_file
from backend.checkpoint_layout import Part, find_controlnet
from backend.nn.controlnet import ControlNetwork
from backend.patcher.controlnet import ControlBase, ControlNet
from backend.state_dict import assign_tensors, build_empty, check_plan, plan_controlnet

logger = logging.getLogger(__name__)

_LATENT_CHANNELS = 4
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_UNSUPPORTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a ControlLLLite", ("lllite_",)),
    ("an IP-Adapter", ("ip_adapter.", "image_proj.")),
    ("a ControlNet for Flux or SD3", ("controlnet_blocks.", "controlnet_x_embedder.", "transformer_blocks.", "double_blocks.", "joint_blocks.")),
    ("a ControlNet stored as differences from SD 1.5", ("difference",)),
    ("a Control-LoRA", ("lora_controlnet",)),
    ("a ControlNet Union", ("task_embedding", "control_add_embedding.")),
)


class HeldTensors:
    """A state dict in memory that reads like a file of tensors."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._tensors = tensors
        self.infos: Mapping[str, TensorInfo] = {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}

    def read(self, key: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", rows: tuple[int, int] | None = None) -> Tensor:
        """A copy of a tensor, or of some of its rows."""
        stored = self._tensors[key].detach()
        return (stored if rows is None else stored[rows[0] : rows[1]]).to(device=device, dtype=dtype or stored.dtype, copy=True)

    def close(self) -> None:
        """Let the tensors go."""
        self._tensors = {}


def load_controlnet(path: Path) -> ControlBase:
    """The ControlNet in a file. Raises: CheckpointError for a file that is none, or of a kind or family that is not supported, by name."""
    with open_tensor_file(path) as file:
        return build_control(file)


def build_control(file: TensorFile) -> ControlBase:
    """The link for a file of tensors. Raises: CheckpointError."""
    _refuse_unsupported(file)
    part = find_controlnet(file.infos)
    if part is None:
        refuse_other_files(file)
    return _build_controlnet(file, part)


def refuse_other_files(file: TensorFile) -> NoReturn:
    """Say what a file is that no kind of control model took. Raises: CheckpointError."""
    _refuse_unsupported(file)
    raise CheckpointError(_unknown_message(file))


def _refuse_unsupported(file: TensorFile) -> None:
    for name, starts in _UNSUPPORTED:
        found = next((key for key in file.infos if key.removeprefix("control_model.").startswith(starts)), None)
        if found is not None:
            raise CheckpointError(
                f"{file.path.name}: is {name} (it holds {found}), which is not supported. ControlNets for SD 1.x, SD 2.x and SDXL can be used."
            )


def _unknown_message(file: TensorFile) -> str:
    kind = checkpoint_identity.identify(file.infos)
    if kind is not None:
        return f"{file.path.name}: is {kind.name}, not a ControlNet. {kind.remedy}."
    return (
        f"{file.path.name}: is no ControlNet that is known here ({len(file.infos)} tensors, the first is {next(iter(file.infos), 'missing')}). "
        "ControlNets for SD 1.x, SD 2.x and SDXL can be used, in the original layout or diffusers'."
    )


def _build_controlnet(file: TensorFile, part: Part) -> ControlNet:
    shape = checkpoint_config.read_controlnet_shape(file, part)
    if shape.in_channels != _LATENT_CHANNELS:
        raise CheckpointError(
            f"{file.path.name}: is a ControlNet that reads {shape.in_channels} channels of latents; SD 1.x, SD 2.x and SDXL have {_LATENT_CHANNELS}."
        )
    family = checkpoint_config.find_family(file, shape)
    config = checkpoint_config.controlnet_config(file, part, shape, family)
    model = build_empty(lambda: ControlNetModel(**config))
    plan = plan_controlnet(model, file, part)
    check_plan(plan, file, "ControlNet")
    assign_tensors(model, plan, file, storage_dtype=pick_dtype(model))
    link = ControlNet(ControlNetwork(model), global_average_pooling="shuffle" in file.path.stem.lower())
    link.name = file.path.name
    logger.info("Loaded %s: a ControlNet for %s, in %s.", file.path.name, checkpoint_config.FAMILY_TITLES[family], str(link.control_model.dtype)[6:])
    return link


def pick_dtype(model: torch.nn.Module) -> torch.dtype:
    """What the network is stored and computed in: what a UNet of its size is computed in on the device in use."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return memory_management.get_computation_dtype(memory_management.get_torch_device(), parameters, _DTYPES)
