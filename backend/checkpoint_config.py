"""Derives the configuration of networks (widths, depths, heads, context) from the shapes in a file. Reads no tensors and asks no hub.

Shapes do not tell the number of heads, so the families' rule is used: SD1.x has 8 per level; SD2.x and SDXL have heads 64 wide or, if a level's
width is not a multiple of 64 (narrow variants), as wide as the width's largest divisor below 64. CLIP's heads follow the second rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part

SD15, SD20, SDXL, SDXL_REFINER = "sd15", "sd20", "sdxl", "sdxl_refiner"
INPAINT_CHANNELS = 9
_NORM_GROUPS = 32
_MAX_LEVELS = 16
"""Of names; networks have up to eleven."""
_UNREAD_CONTEXT_WIDTH = 32
"""The text width given to a network without attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetLevel:
    """One resolution of a UNet: its width, and transformer blocks per layer on the way down and up (0: no attention)."""

    width: int
    depths_down: tuple[int, ...]
    depths_up: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetShape:
    """A UNet's structure, derived from its shapes.

    `mid_depth` is 0 if the middle block is a single resnet (SSD-1B); distilled variants (small-sd, tiny-sd) have no middle block. `vector_width` is
    the width of SDXL's extra vector, None without one.
    """

    in_channels: int
    out_channels: int
    levels: tuple[UNetLevel, ...]
    mid_depth: int
    context_width: int
    has_linear_projections: bool
    vector_width: int | None
    has_middle: bool = True


class _Names:
    """Names and shapes of one part, without its prefix."""

    def __init__(self, file: TensorFile, part: Part, what: str) -> None:
        self._file_name, self._what = file.path.name, what
        self.prefix = part.prefix
        self.shapes = {key.removeprefix(part.prefix): info.shape for key, info in file.infos.items() if key.startswith(part.prefix)}
        self._levels = {level for name in self.shapes for level in _levels_of(name)}

    def shape(self, key: str) -> tuple[int, ...]:
        if key not in self.shapes:
            raise CheckpointError(
                f"{self._file_name}: looks like a checkpoint, but its {self._what} lacks {self.prefix}{key}. The file is incomplete: "
                "download it again, or convert it again from its source."
            )
        return self.shapes[key]

    def count(self, pattern: str) -> int:
        """How many consecutive numbers 0, 1, 2, ... for `{}` in `pattern` give the start of some name."""
        index = 0
        while self.has(pattern.format(index)):
            index += 1
        return index

    def first_ending(self, ending: str) -> str:
        """The first name with this ending, without the ending."""
        found = next((name.removesuffix(ending) for name in self.shapes if name.endswith(ending)), None)
        if found is None:
            raise CheckpointError(
                f"{self._file_name}: its {self._what} has no tensor {self.prefix}*{ending}, so it does not use text. "
                "The file is incomplete, or the model takes no prompts, which is not supported. Choose another file."
            )
        return found

    def refuse_gaps(self, lead: str) -> None:
        """Raises: CheckpointError if the block numbers have gaps."""
        numbers = {int(found[1]) for found in map(re.compile(re.escape(lead) + r"(\d{1,4})\.").match, self.shapes) if found}
        missing = sorted(set(range(max(numbers, default=-1) + 1)) - numbers)
        if missing:
            raise CheckpointError(
                f"{self._file_name}: its {self._what} has no {self.prefix}{lead}{missing[0]}, but later ones. The file is incomplete, or a distilled "
                "model (BK-SDM: small-sd, tiny-sd) converted with the full model's numbers: use it in diffusers' layout."
            )

    def has(self, level: str) -> bool:
        """Whether there is a name in this level ("a.b."), or of this name. Takes the same time for any number of names."""
        return level in self._levels or level in self.shapes


def _levels_of(name: str) -> Iterator[str]:
    """The levels a name is in, outermost first: "a.b.c" -> "a.", "a.b."."""
    end = name.find(".")
    for _ in range(_MAX_LEVELS):
        if end < 0:
            return
        yield name[: end + 1]
        end = name.find(".", end + 1)


# --- UNet ---------------------------------------------------------------------------------------------------------------------------


def read_unet_shape(file: TensorFile, part: Part) -> UNetShape:
    """Raises: CheckpointError when a tensor that tells the shape is missing, or the shapes fit no U-shaped network."""
    names = _Names(file, part, "UNet")
    if part.layout is Layout.LDM:
        levels, conv_in, conv_out, mid, vector = (
            _ldm_levels(names),
            "input_blocks.0.0.weight",
            "out.2.weight",
            "middle_block.1.",
            "label_emb.0.0.weight",
        )
    else:
        levels, conv_in, conv_out, mid = _diffusers_levels(names), "conv_in.weight", "conv_out.weight", "mid_block.attentions.0."
        vector = "add_embedding.linear_1.weight" if names.has("add_embedding.") else "class_embedding.linear_1.weight"
    if not levels:
        raise CheckpointError(f"{file.path.name}: its UNet has no blocks that could be read. The file is incomplete; download it again.")
    mid_depth = names.count(mid + "transformer_blocks.{}.")
    attention = mid if mid_depth else names.first_ending(".transformer_blocks.0.attn2.to_k.weight") + "."
    return UNetShape(
        in_channels=names.shape(conv_in)[1],
        out_channels=names.shape(conv_out)[0],
        levels=levels,
        mid_depth=mid_depth,
        context_width=names.shape(f"{attention}transformer_blocks.0.attn2.to_k.weight")[1],
        has_linear_projections=len(names.shape(f"{attention}proj_in.weight")) == 2,
        vector_width=names.shape(vector)[1] if names.has(vector) else None,
        has_middle=names.has("middle_block.") or names.has("mid_block."),
    )


def read_controlnet_shape(file: TensorFile, part: Part) -> UNetShape:
    """A ControlNet as a UNet that ends with its middle block: no output channels, no depths on the way up. `context_width` is 0 without attention.

    Raises: CheckpointError when a tensor that tells the shape is missing.
    """
    names = _Names(file, part, "ControlNet")
    if part.layout is Layout.LDM:
        levels, conv_in, mid, vector = _ldm_levels(names), "input_blocks.0.0.weight", "middle_block.1.", "label_emb.0.0.weight"
    else:
        levels, conv_in, mid, vector = _diffusers_levels(names), "conv_in.weight", "mid_block.attentions.0.", "add_embedding.linear_1.weight"
    if not levels:
        raise CheckpointError(f"{file.path.name}: its ControlNet has no blocks that could be read. The file is incomplete; download it again.")
    has_attention = any(".transformer_blocks.0.attn2.to_k.weight" in name for name in names.shapes)
    mid_depth = names.count(mid + "transformer_blocks.{}.")
    attention = mid if mid_depth or not has_attention else names.first_ending(".transformer_blocks.0.attn2.to_k.weight") + "."
    return UNetShape(
        in_channels=names.shape(conv_in)[1],
        out_channels=0,
        levels=levels,
        mid_depth=mid_depth,
        context_width=names.shape(f"{attention}transformer_blocks.0.attn2.to_k.weight")[1] if has_attention else 0,
        has_linear_projections=has_attention and len(names.shape(f"{attention}proj_in.weight")) == 2,
        vector_width=names.shape(vector)[1] if names.has(vector) else None,
    )


def _ldm_levels(names: _Names) -> tuple[UNetLevel, ...]:
    names.refuse_gaps("input_blocks.")
    names.refuse_gaps("output_blocks.")
    widths: list[int] = []
    downs: list[list[int]] = [[]]
    for position in range(1, names.count("input_blocks.{}.")):
        block = f"input_blocks.{position}"
        if names.has(f"{block}.0.op."):
            downs.append([])
            continue
        if not downs[-1]:
            widths.append(names.shape(f"{block}.0.in_layers.2.weight")[0])
        downs[-1].append(names.count(block + ".1.transformer_blocks.{}."))
    ups_outermost_last = [
        names.count(f"output_blocks.{position}.1.transformer_blocks." + "{}.") for position in range(names.count("output_blocks.{}."))
    ]
    return _join_levels(widths, downs, ups_outermost_last)


def _diffusers_levels(names: _Names) -> tuple[UNetLevel, ...]:
    num_levels = names.count("down_blocks.{}.")
    widths = [names.shape(f"down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(num_levels)]
    downs = [
        [
            names.count(f"down_blocks.{level}.attentions.{layer}.transformer_blocks." + "{}.")
            for layer in range(names.count(f"down_blocks.{level}.resnets." + "{}."))
        ]
        for level in range(num_levels)
    ]
    ups = [
        names.count(f"up_blocks.{level}.attentions.{layer}.transformer_blocks." + "{}.")
        for level in range(names.count("up_blocks.{}."))
        for layer in range(names.count(f"up_blocks.{level}.resnets." + "{}."))
    ]
    return _join_levels(widths, downs, ups)


def _join_levels(widths: Sequence[int], downs: Sequence[Sequence[int]], ups_outermost_last: Sequence[int]) -> tuple[UNetLevel, ...]:
    """Deal the flat list of up layers to the levels, innermost first; a level has one up layer more than down layers."""
    levels: list[UNetLevel] = []
    taken = 0
    for width, down in reversed(list(zip(widths, downs, strict=False))):
        up = tuple(ups_outermost_last[taken : taken + len(down) + 1])
        taken += len(down) + 1
        levels.insert(0, UNetLevel(width=width, depths_down=tuple(down), depths_up=up))
    return tuple(levels)


def unet_config(shape: UNetShape, family: str) -> dict[str, Any]:
    """Arguments for diffusers' UNet2DConditionModel. Raises: CheckpointError for a shape that class does not support."""
    widths = [level.width for level in shape.levels]
    config: dict[str, Any] = {
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "block_out_channels": widths,
        "layers_per_block": _one_if_equal([len(level.depths_down) for level in shape.levels]),
        "down_block_types": ["CrossAttnDownBlock2D" if any(level.depths_down) else "DownBlock2D" for level in shape.levels],
        "up_block_types": ["CrossAttnUpBlock2D" if any(level.depths_up) else "UpBlock2D" for level in reversed(shape.levels)],
        "cross_attention_dim": shape.context_width,
        "mid_block_type": None if not shape.has_middle else "UNetMidBlock2DCrossAttn" if shape.mid_depth else "UNetMidBlock2D",
        "use_linear_projection": shape.has_linear_projections,
        "attention_head_dim": 8 if family == SD15 else [head_count(width) for width in widths],  # diffusers' name; it means the number of heads
    }
    config.update(_depth_config(shape))
    if shape.vector_width is not None:
        config.update(addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=shape.vector_width)
    return config


_CONTROLNET_FIELDS = (
    "in_channels", "block_out_channels", "layers_per_block", "down_block_types", "mid_block_type", "cross_attention_dim", "use_linear_projection",
    "attention_head_dim", "transformer_layers_per_block", "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
)  # fmt: skip


def controlnet_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that a ControlNet shares with its UNet."""
    return {name: config[name] for name in _CONTROLNET_FIELDS if name in config}


def controlnet_config(file: TensorFile, part: Part, shape: UNetShape, family: str) -> dict[str, Any]:
    """Arguments for diffusers' ControlNetModel. Raises: CheckpointError for a shape that class does not support."""
    config = controlnet_fields(unet_config(shape, family))
    if not isinstance(config["layers_per_block"], int):
        raise CheckpointError(
            f"{file.path.name}: is a ControlNet with {config['layers_per_block']} resnets per level; diffusers' ControlNet has the same number on "
            "every level. This variant is not supported; use another ControlNet."
        )
    channels, *widths = hint_widths(file, part)
    return {
        **config,
        "cross_attention_dim": shape.context_width or _UNREAD_CONTEXT_WIDTH,
        "conditioning_channels": channels,
        "conditioning_embedding_out_channels": widths,
    }


def union_config(file: TensorFile, part: Part, config: Mapping[str, Any]) -> dict[str, Any]:
    """A ControlNet's arguments plus those of diffusers' ControlNetUnionModel. Raises: CheckpointError when a tensor is missing."""
    names = _Names(file, part, "ControlNet Union")
    num_types, width = names.shape("task_embedding")
    return {
        **{name: value for name, value in config.items() if name != "mid_block_type"},
        "num_control_type": num_types,
        "num_trans_channel": width,
        "num_trans_head": 8 if width % 8 == 0 else 1,
        "num_trans_layer": names.count("transformer_layes.{}."),
        "num_proj_channel": names.shape("spatial_ch_projs.weight")[0],
    }


def hint_widths(file: TensorFile, part: Part) -> tuple[int, ...]:
    """A hint's channels, then the widths of the layers that read it, outermost first. Raises: CheckpointError if there are none."""
    names = _Names(file, part, "ControlNet")
    if part.layout is Layout.LDM:
        stored = [name for name in names.shapes if re.fullmatch(r"input_hint_block\.\d+\.weight", name)]
        convolutions = sorted(stored, key=lambda name: int(name.split(".")[1]))[:-1]
    else:
        head = "controlnet_cond_embedding"
        convolutions = [f"{head}.conv_in.weight", *(f"{head}.blocks.{index}.weight" for index in range(names.count(head + ".blocks.{}.")))]
    shapes = [names.shape(name) for name in convolutions]
    if not shapes:
        raise CheckpointError(f"{file.path.name}: its ControlNet has no layers that read the hint. The file is incomplete; download it again.")
    return shapes[0][1], shapes[0][0], *(shape[0] for shape in shapes[2::2])


def _depth_config(shape: UNetShape) -> dict[str, Any]:
    """Transformer blocks: one number per level if uniform and equal on both ways, else one per layer (distilled SDXL)."""
    is_even = all(len({*level.depths_down, *level.depths_up}) == 1 for level in shape.levels)
    last = shape.levels[-1].depths_down
    mid_depth = shape.mid_depth or last[0] or 1  # the class takes the middle block's number from the last level's
    if is_even and last[0] in (0, mid_depth):
        depths = [level.depths_down[0] or 1 for level in shape.levels]
        return {"transformer_layers_per_block": _one_if_equal([*depths[:-1], mid_depth])}
    nested: list[Any] = [list(level.depths_down) if any(level.depths_down) else 1 for level in shape.levels]
    reverse = [list(level.depths_up) if any(level.depths_up) else 1 for level in reversed(shape.levels)]
    if not any(last):
        nested[-1] = mid_depth
    elif last[0] != mid_depth:
        raise CheckpointError(
            f"The UNet has {shape.mid_depth} transformer blocks in its middle block and {last[0]} in its last level; diffusers' UNet needs the "
            "same number in both. This variant of the family is not supported; use another checkpoint."
        )
    return {"transformer_layers_per_block": nested, "reverse_transformer_layers_per_block": reverse}


def head_count(width: int) -> int:
    """Number of heads for a layer this wide: each has 64 channels, or the width's largest divisor below 64."""
    return width // max(size for size in range(1, min(width, 64) + 1) if width % size == 0)


def _one_if_equal(numbers: list[int]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else numbers


# --- VAE ----------------------------------------------------------------------------------------------------------------------------


_VAE_OWNERS = {16: "Flux and SD3", 32: "Flux.2"}


def vae_config(file: TensorFile, part: Part, *, channels: int, scale: float, family_title: str) -> dict[str, Any]:
    """Arguments for diffusers' AutoencoderKL; `channels` and `scale` describe the family's latents.

    Raises: CheckpointError when shapes are missing or belong to another family's VAE.
    """
    names = _Names(file, part, "VAE")
    level_name, layer_name = ("encoder.down.", ".block.") if part.layout is Layout.LDM else ("encoder.down_blocks.", ".resnets.")
    num_levels = names.count(level_name + "{}.")
    latent_channels = names.shape("decoder.conv_in.weight")[1]
    if latent_channels != channels:
        owner = _VAE_OWNERS.get(latent_channels)
        owners = f"{latent_channels} channels belong to {owner}. " if owner else ""
        raise CheckpointError(
            f"{file.path.name}: is a VAE with {latent_channels} latent channels; {family_title} needs one with {channels}. "
            f"{owners}Choose another VAE, or None."
        )
    return {
        "in_channels": names.shape("encoder.conv_in.weight")[1],
        "out_channels": names.shape("decoder.conv_out.weight")[0],
        "latent_channels": latent_channels,
        "block_out_channels": [names.shape(f"{level_name}{level}{layer_name}0.conv1.weight")[0] for level in range(num_levels)],
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "layers_per_block": names.count(f"{level_name}0{layer_name}" + "{}."),
        "norm_num_groups": _NORM_GROUPS,
        "scaling_factor": scale,
        "use_quant_conv": names.has("quant_conv."),
        "use_post_quant_conv": names.has("post_quant_conv."),
        "mid_block_add_attention": names.has("decoder.mid.attn_1.") or names.has("decoder.mid_block.attentions."),
    }


# --- text encoders ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class TextShape:
    """A CLIP text encoder's structure, derived from its shapes. `projected_width` is None without a projection."""

    vocab_length: int
    width: int
    num_positions: int
    inner_width: int
    num_layers: int
    projected_width: int | None


def read_text_shape(file: TensorFile, part: Part) -> TextShape:
    """Raises: CheckpointError when a tensor that tells the shape is missing."""
    names = _Names(file, part, "text encoder")
    if part.layout is Layout.OPEN_CLIP:
        token, position, layers, inner = (
            "token_embedding.weight",
            "positional_embedding",
            "transformer.resblocks.{}.",
            "transformer.resblocks.0.mlp.c_fc.weight",
        )
    else:
        level = "text_model." if names.has("text_model.") else ""
        token, position = f"{level}embeddings.token_embedding.weight", f"{level}embeddings.position_embedding.weight"
        layers, inner = level + "encoder.layers.{}.", f"{level}encoder.layers.0.mlp.fc1.weight"
    vocab_length, width = names.shape(token)
    return TextShape(
        vocab_length=vocab_length,
        width=width,
        num_positions=names.shape(position)[0],
        inner_width=names.shape(inner)[0],
        num_layers=names.count(layers),
        projected_width=_projected_width(names.shapes),
    )


def _projected_width(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    if "text_projection" in shapes:  # OpenCLIP stores (width, projected)
        return shapes["text_projection"][1]
    return shapes["text_projection.weight"][0] if "text_projection.weight" in shapes else None


def text_config(shape: TextShape, *, is_open_clip: bool, num_layers: int) -> dict[str, Any]:
    """Arguments for transformers' CLIPTextConfig. OpenAI's CLIP-L uses quick GELU and pads with the end token; OpenCLIP uses exact GELU and 0."""
    end_token_id = 49407
    return {
        "vocab_size": shape.vocab_length,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner_width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": head_count(shape.width),
        "max_position_embeddings": shape.num_positions,
        "hidden_act": "gelu" if is_open_clip else "quick_gelu",
        "projection_dim": shape.projected_width or shape.width,
        "bos_token_id": end_token_id - 1,
        "eos_token_id": end_token_id,
        "pad_token_id": 0 if is_open_clip else end_token_id,
    }
