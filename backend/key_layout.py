"""Translates key names of diffusers and transformers networks to the original single-file layout ("ldm").

One direction is enough: a loader looks up the file's name for each key of the network it has built, a writer renames the keys it has. Works on
names and tensors only; knows no files, no devices, and no families beyond their prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from backend.storage.kinds import storage_of

if TYPE_CHECKING:
    from torch import Tensor

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_L_PREFIX = "cond_stage_model.transformer."
OPEN_CLIP_PREFIX = "cond_stage_model.model."
SDXL_CLIP_L_PREFIX = "conditioner.embedders.0.transformer."
SDXL_OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."
REFINER_OPEN_CLIP_PREFIX = "conditioner.embedders.0.model."

_RESNET_CHILDREN = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION_CHILDREN = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_VAE_ATTENTION_CHILDREN = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_LAYER_CHILDREN = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_QKV = ("q_proj", "k_proj", "v_proj")


# --- UNet ---------------------------------------------------------------------------------------------------------------------------


def unet_module_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Maps diffusers to ldm module names, for every renamed module and any number of levels, resnets per level and attentions.

    `config`: a UNet2DConditionModel's; down_block_types, up_block_types and layers_per_block (one number, or one per level) are read.
    """
    names = dict(_UNET_ENDS)
    names.update(_down_names(config))
    names.update(_mid_names())
    names.update(_up_names(config))
    return names


def _mid_names() -> Iterator[tuple[str, str]]:
    for index in range(2):
        yield from _resnet_names(f"mid_block.resnets.{index}", f"middle_block.{2 * index}")
    yield "mid_block.attentions.0", "middle_block.1"


def _down_names(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    block_types = config["down_block_types"]
    position = 1
    for level, num_layers in enumerate(_layers_per_level(config)):
        for layer in range(num_layers):
            yield from _resnet_names(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{position}.0")
            yield f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{position}.1"
            position += 1
        if level < len(block_types) - 1:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{position}.0.op"
            position += 1


def _up_names(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    block_types = config["up_block_types"]
    position = 0
    for level, num_layers in enumerate(reversed(_layers_per_level(config))):
        for layer in range(num_layers + 1):
            yield from _resnet_names(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{position}.0")
            yield f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{position}.1"
            position += 1
        if level < len(block_types) - 1:
            child = 2 if "CrossAttn" in block_types[level] else 1  # the upsampler comes after the last entry's layers
            yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{position - 1}.{child}.conv"


def _layers_per_level(config: Mapping[str, Any]) -> list[int]:
    layers = config["layers_per_block"]
    num_levels = len(config["down_block_types"])
    return [layers] * num_levels if isinstance(layers, int) else list(layers)


def _resnet_names(diffusers: str, ldm: str) -> Iterator[tuple[str, str]]:
    for child, ldm_child in _RESNET_CHILDREN.items():
        yield f"{diffusers}.{child}", f"{ldm}.{ldm_child}"


def rename_by_module(key: str, names: Mapping[str, str]) -> str:
    """`key` with its longest leading module name that is in `names` replaced.

    Raises: KeyError if no leading part of `key` is in `names`.
    """
    head = key
    while head:
        if head in names:
            return names[head] + key[len(head) :]
        head = head.rpartition(".")[0]
    raise KeyError(f"{key} does not exist in the original layout")


def unet_to_ldm(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A diffusers UNet's state dict under the original names, without the `model.diffusion_model.` prefix. Tensors are shared, not copied."""
    names = unet_module_names(config)
    return {rename_by_module(key, names): tensor for key, tensor in state_dict.items()}


# --- ControlNet ---------------------------------------------------------------------------------------------------------------------


def controlnet_module_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Maps diffusers to ldm module names for a ControlNetModel with this config: a UNet's input half, and the ControlNet's own layers."""
    hint_convolutions = 2 * (len(config["conditioning_embedding_out_channels"]) - 1)
    names = {name: _UNET_ENDS[name] for name in _UNET_ENDS if not name.startswith("conv_norm_out") and name != "conv_out"}
    names.update(_down_names(config))
    names.update(_mid_names())
    names["controlnet_cond_embedding.conv_in"] = "input_hint_block.0"
    for index in range(hint_convolutions):
        names[f"controlnet_cond_embedding.blocks.{index}"] = f"input_hint_block.{2 * (index + 1)}"
    names["controlnet_cond_embedding.conv_out"] = f"input_hint_block.{2 * (hint_convolutions + 1)}"
    for index in range(1 + sum(_layers_per_level(config)) + len(config["down_block_types"]) - 1):
        names[f"controlnet_down_blocks.{index}"] = f"zero_convs.{index}.0"
    names["controlnet_mid_block"] = "middle_block_out.0"
    return names


# --- VAE ----------------------------------------------------------------------------------------------------------------------------


def vae_key_to_ldm(key: str, num_levels: int) -> str:
    """The original name of an AutoencoderKL key. There, decoder levels are numbered in reverse."""
    half, _, rest = key.partition(".")
    if half not in ("encoder", "decoder"):
        return key  # quant_conv, post_quant_conv
    return f"{half}.{_vae_half_to_ldm(rest, num_levels)}"


def _vae_half_to_ldm(rest: str, num_levels: int) -> str:
    parts = rest.split(".")
    tail = ".".join(parts[4:]).replace("conv_shortcut", "nin_shortcut")
    match parts:
        case ["down_blocks", level, "resnets", layer, *_]:
            return f"down.{level}.block.{layer}.{tail}"
        case ["down_blocks", level, "downsamplers", "0", *_]:
            return f"down.{level}.downsample.{tail}"
        case ["up_blocks", level, "resnets", layer, *_]:
            return f"up.{num_levels - 1 - int(level)}.block.{layer}.{tail}"
        case ["up_blocks", level, "upsamplers", "0", *_]:
            return f"up.{num_levels - 1 - int(level)}.upsample.{tail}"
        case ["mid_block", "resnets", index, *inner]:
            return f"mid.block_{int(index) + 1}.{'.'.join(inner).replace('conv_shortcut', 'nin_shortcut')}"
        case ["mid_block", "attentions", "0", *inner]:
            return f"mid.attn_1.{rename_by_module('.'.join(inner), _VAE_ATTENTION_CHILDREN)}"
    return rest.replace("conv_norm_out", "norm_out")


def vae_to_ldm(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """An AutoencoderKL's state dict under the original names, without prefix. Attention weights (out, in) become 1x1 kernels (out, in, 1, 1)."""
    num_levels = len(config["up_block_types"])
    renamed = {vae_key_to_ldm(key, num_levels): tensor for key, tensor in state_dict.items()}
    return {key: _as_conv(tensor) if _is_attention_weight(key) else tensor for key, tensor in renamed.items()}


def _is_attention_weight(key: str) -> bool:
    return ".mid.attn_1." in key and key.endswith(".weight") and ".norm." not in key


def _as_conv(tensor: Tensor) -> Tensor:
    return tensor[:, :, None, None] if tensor.ndim == 2 else tensor


# --- text encoders ------------------------------------------------------------------------------------------------------------------


def clip_to_text_model(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder's state dict with the `text_model.` level of original files and older transformers.

    `text_projection` stays outside of that level.
    """
    return {_with_text_model(key): tensor for key, tensor in state_dict.items()}


def _with_text_model(key: str) -> str:
    return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"


def clip_to_open_clip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder's state dict in OpenCLIP's layout, without prefix: q, k, v fused (3 * width rows), text_projection (width, projected)."""
    bare = {key.removeprefix("text_model."): tensor for key, tensor in state_dict.items()}
    renamed: dict[str, Tensor] = {}
    for key, tensor in bare.items():
        name = open_clip_key(key)
        if ".in_proj_" in name:
            thirds = [storage_of(bare[part_key]) for part_key in qkv_keys(key)]
            renamed[name] = type(thirds[0]).concat(thirds).tensor
        else:
            renamed[name] = tensor.T.contiguous() if name == "text_projection" else tensor
    return renamed


def qkv_keys(key: str) -> tuple[str, str, str]:
    """The keys of q, k and v in the order in which OpenCLIP fuses them, given any of the three."""
    head, _, tail = key.partition(".self_attn.")
    kind = tail.rpartition(".")[2]
    query, key_, value = (f"{head}.self_attn.{part}.{kind}" for part in _QKV)
    return query, key_, value


def open_clip_key(key: str) -> str:
    """The OpenCLIP name of a transformers key (without `text_model.`). q, k and v share one name.

    Raises: KeyError for a key that is not in a CLIP text encoder.
    """
    if key in _OPEN_CLIP_ENDS:
        return _OPEN_CLIP_ENDS[key]
    if not key.startswith("encoder.layers."):
        raise KeyError(f"{key} does not exist in OpenCLIP's layout")
    layer, _, inner = key.removeprefix("encoder.layers.").partition(".")
    block = f"transformer.resblocks.{layer}"
    for part in _QKV:
        if inner.startswith(f"self_attn.{part}."):
            return f"{block}.attn.in_proj_{inner.rpartition('.')[2]}"
    return f"{block}.{rename_by_module(inner, _OPEN_CLIP_LAYER_CHILDREN)}"


def append_unused_block(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP keys with a second copy of the last block.

    SD2.x files contain all 24 blocks of OpenCLIP H and use 23; readers expect the unused one to exist.
    """
    last = max(int(key.split(".")[2]) for key in state_dict if key.startswith("transformer.resblocks."))
    old, new = f"transformer.resblocks.{last}.", f"transformer.resblocks.{last + 1}."
    copies = {new + key.removeprefix(old): tensor.clone() for key, tensor in state_dict.items() if key.startswith(old)}
    return {**state_dict, **copies}
