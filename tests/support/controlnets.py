"""ControlNet files for tests: diffusers' own networks with random weights for the narrow checkpoints, written in either layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter
from diffusers.utils.state_dict_utils import convert_sai_sd_control_lora_state_dict_to_peft
from safetensors.torch import save_file
from torch import Tensor

from backend.key_layout import controlnet_module_names, rename_by_module
from tests.support.checkpoints import ReferenceModels


def build_controlnet(models: ReferenceModels, *, seed: int = 1, residual_scale: float = 0.1) -> ControlNetModel:
    """A ControlNet for a narrow checkpoint. Its last convolutions, zero in a new network, are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        controlnet = ControlNetModel.from_unet(models.unet).eval().requires_grad_(False)
        _randomise(controlnet, residual_scale)
    return controlnet


def build_union(models: ReferenceModels, *, num_types: int = 8, seed: int = 6) -> ControlNetUnionModel:
    """A random ControlNet Union for a narrow SDXL checkpoint."""
    width = models.unet.config.block_out_channels[0]
    fields = {name: value for name, value in build_controlnet(models).config.items() if name[0] != "_" and name != "mid_block_type"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        union = ControlNetUnionModel.from_config(
            {**fields, "num_control_type": num_types, "num_trans_channel": width, "num_proj_channel": width, "num_trans_layer": 2}
        )
        union.eval().requires_grad_(False)
        _randomise(union, 0.1)
        with torch.no_grad():
            union.spatial_ch_projs.weight.normal_(std=0.3)
    return union


@torch.no_grad()
def _randomise(controlnet: Any, residual_scale: float) -> None:
    controlnet.controlnet_cond_embedding.conv_out.weight.normal_(std=0.2)
    controlnet.controlnet_cond_embedding.conv_out.bias.normal_(std=0.2)
    for convolution in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        convolution.weight.normal_(std=residual_scale)
        convolution.bias.normal_(std=residual_scale)


def ldm_state_dict(controlnet: Any) -> dict[str, Tensor]:
    """The original layout, without prefix."""
    names = controlnet_module_names(controlnet.config)
    return {rename_by_module(key, names): tensor for key, tensor in controlnet.state_dict().items()}


def write_controlnet(path: Path, controlnet: Any, *, layout: str = "ldm", prefix: str = "control_model.") -> Path:
    """`layout`: "ldm" with `prefix` before the keys, or "diffusers". A `.pth` path is pickled."""
    named = {prefix + key: tensor for key, tensor in ldm_state_dict(controlnet).items()} if layout == "ldm" else controlnet.state_dict()
    state_dict = {key: tensor.contiguous() for key, tensor in named.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state_dict, path)
    else:
        torch.save(state_dict, path)
    return path


def hint(side_px: int = 64, *, seed: int = 5, batch: int = 1) -> Tensor:
    """A random hint (B, 3, side, side) from 0 to 1."""
    return torch.rand(batch, 3, side_px, side_px, generator=torch.Generator().manual_seed(seed))


def build_adapter(models: ReferenceModels, kind: str, *, channels: int = 3, seed: int = 4) -> T2IAdapter:
    """A random T2I-Adapter for a narrow checkpoint. `kind` as in the library."""
    widths = list(models.unet.config.block_out_channels)
    widths = [*widths, widths[-1]] if kind == "full_adapter_xl" else widths[:-1] if kind == "light_adapter" else widths
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T2IAdapter(
            in_channels=channels, channels=widths, num_res_blocks=4 if kind == "light_adapter" else 2,
            downscale_factor=16 if kind == "full_adapter_xl" else 8, adapter_type=kind,
        ).eval().requires_grad_(False)  # fmt: skip


def write_adapter(path: Path, adapter: Any, *, layout: str) -> Path:
    """`layout`: "diffusers", or "ldm" for the names of the first files (one flat list of resnets; light ones nest them in `body`)."""
    is_light = adapter.config.adapter_type == "light_adapter"

    def rename(key: str) -> str:
        bare = key.removeprefix("adapter.")
        if is_light:
            return bare.replace(".resnets.", ".body.")
        parts = bare.split(".")
        if parts[0] != "body":
            return bare
        at = 2 * int(parts[1]) + (int(parts[3]) if parts[2] == "resnets" else 0)
        return ".".join(["body", str(at), *parts[4 if parts[2] == "resnets" else 2 :]])

    named = {key if layout == "diffusers" else rename(key): tensor.contiguous() for key, tensor in adapter.state_dict().items()}
    save_file(named, path)
    return path


def write_control_lora(path: Path, models: ReferenceModels, *, rank: int = 3, seed: int = 8) -> dict[str, Tensor]:
    """A random Control-LoRA with its publisher's names: low-rank factors for the weights of the UNet's input half, whole tensors for the rest."""
    controlnet = build_controlnet(models, seed=seed)
    unet_names = set(models.unet.state_dict())
    generator = torch.Generator().manual_seed(seed)
    stored: dict[str, Tensor] = {"lora_controlnet": torch.zeros(0)}
    names = controlnet_module_names(controlnet.config)
    for key, tensor in controlnet.state_dict().items():
        name = rename_by_module(key, names)
        if key not in unet_names:
            stored[name] = tensor.contiguous()
        elif tensor.ndim > 1:
            layer, (rows, columns, *kernel) = name.removesuffix(".weight"), tensor.shape
            size = tensor[0].numel() ** -0.5
            stored[f"{layer}.up"] = torch.randn(rows, rank, *[1] * len(kernel), generator=generator)
            stored[f"{layer}.down"] = torch.randn(rank, columns, *kernel, generator=generator) * size
        else:
            stored[name] = tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored, path)
    return stored


@torch.no_grad()
def apply_control_lora(models: ReferenceModels, stored: dict[str, Tensor]) -> ControlNetModel:
    """The library's ControlNet for the UNet's own encoder, with the file's tensors inserted manually under the library's names."""
    stored = {key: tensor for key, tensor in stored.items() if key != "lora_controlnet"}
    controlnet = ControlNetModel.from_unet(models.unet).eval().requires_grad_(False)
    own = controlnet.state_dict()
    for key, tensor in convert_sai_sd_control_lora_state_dict_to_peft(stored).items():
        if key.endswith(".lora_A.weight"):
            continue
        if not key.endswith(".lora_B.weight"):
            own[key].copy_(tensor)
            continue
        layer = key.removesuffix(".lora_B.weight")
        down = convert_sai_sd_control_lora_state_dict_to_peft(stored)[f"{layer}.lora_A.weight"]
        if tensor.ndim == 4:
            own[f"{layer}.weight"] += torch.einsum("orxy,rikl->oikl", tensor, down)
        else:
            own[f"{layer}.weight"] += tensor @ down
    return controlnet


@dataclass(frozen=True, eq=False)
class RunsHere:
    """A runner that only accepts deferred residuals."""

    model: Any
    deferred_networks: frozenset[Any] = frozenset()

    def run(self, call: Any) -> Any:
        return self.model.run_here(call)


def with_deferred_controlnets(call_model: Any) -> Any:
    """`_call_model` of the sampling function, leaving the ControlNets to whoever runs the rows."""

    def call(model: Any, plan: Any, *args: Any) -> Any:
        chain, networks = plan.branches[0].control, []
        while chain is not None:
            networks.append(chain.control_model)
            chain = chain.previous_controlnet
        before = model.runner
        model.runner = replace(before or RunsHere(model), deferred_networks=frozenset(networks))
        try:
            return call_model(model, plan, *args)
        finally:
            model.runner = before

    return call
