"""The VAE that Qwen-Image, Krea 2 and Anima share with Wan 2.1: its places in files, its names, its latents.

encoder.down_blocks.0.norm1, conv1, norm2, conv2     encoder.downsamples.0.residual.0, .2, .3, .6
encoder.mid_block.resnets.0, attentions.0            encoder.middle.0, .1
decoder.up_blocks.1.resnets.0, upsamplers.0          decoder.upsamples.4, .7          (three resnets and an upsampler a level)
quant_conv, post_quant_conv                          conv1, conv2
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import VIDEO_VAE_MARK, Layout, Part, find_vae
from backend.families.family import Component
from backend.families.file_shapes import read_part
from backend.families.latent_format import LatentFormat
from backend.nn.picture_vae import PictureVae
from backend.state_dict import LoadPlan, build_empty, plan_as_named

NUM_LEVELS = 4
USUAL_FILE = "qwen_image_vae.safetensors (0.25 GB)"
_TITLE = "the VAE of Qwen-Image"
_PREFIXES = ("vae.", "first_stage_model.", "")
_MARKS = {Layout.LDM: "decoder.middle.0.residual.0.gamma", Layout.DIFFUSERS: VIDEO_VAE_MARK}
_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
"""Published with the VAE, per channel."""
LATENT = LatentFormat(channels=16, factor=8, scale=tuple(1.0 / std for std in _STD), shift=_MEAN, cell=2)
"""A preview's colors are fitted to the VAE."""


def qwen_vae(family_title: str) -> Component:
    """The component. A VAE of another kind is found too, and refused by name when it is to be built."""
    return Component(
        name="vae",
        title="VAE",
        find=lambda file: find_qwen_vae(file.infos) or ([part] if (part := find_vae(file.infos)) is not None else []),
        build=partial(build_qwen_vae, family_title=family_title),
        plan=plan_qwen_vae,
        usual_file=USUAL_FILE,
    )


def find_qwen_vae(keys: Collection[str]) -> Sequence[Part]:
    """The first such VAE in a file, in Wan's layout or diffusers'."""
    return next(([Part(prefix, layout)] for prefix in _PREFIXES for layout, mark in _MARKS.items() if prefix + mark in keys), [])


def build_qwen_vae(file: TensorFile, part: Part, *, family_title: str) -> nn.Module:
    """Without memory. Raises: CheckpointError for a VAE of another kind, or with other channels."""
    if part.prefix + _MARKS.get(part.layout, "") not in file.infos:
        raise CheckpointError(
            f"{file.path.name}: is a VAE of another family of models; {family_title} needs {USUAL_FILE}, or the VAE of Wan 2.1. Remove it from "
            "'VAE / Text Encoder'."
        )
    config = read_config(file, part, family_title)
    return build_empty(lambda: cast("nn.Module", PictureVae(**config)))


def read_config(file: TensorFile, part: Part, family_title: str) -> dict[str, Any]:
    """Arguments for PictureVae. Raises: CheckpointError."""
    shapes, is_original = read_part(file, part, _TITLE), part.layout is Layout.LDM
    blocks, conv = ("encoder.downsamples.", "residual.2.weight") if is_original else ("encoder.down_blocks.", "conv1.weight")
    has_time: list[bool] = []
    levels: list[list[int]] = [[]]  # the widths of each level's resnets
    for number in range(shapes.count_blocks(blocks)):
        if f"{blocks}{number}.resample.1.weight" in shapes:
            has_time.append(f"{blocks}{number}.time_conv.weight" in shapes)
            levels.append([])
        else:
            levels[-1].append(shapes.find(f"{blocks}{number}.{conv}", 5)[0])
    channels = shapes.find(f"decoder.{'conv1' if is_original else 'conv_in'}.weight", 5)[1]
    if channels != LATENT.channels:
        raise CheckpointError(f"{file.path.name}: is a VAE with {channels} latent channels; {family_title} needs one with 16: {USUAL_FILE}.")
    widths = [level[0] for level in levels if level]
    is_even = all(len(level) == len(levels[0]) and len({*level}) == 1 for level in levels)
    if len(levels) != NUM_LEVELS or not is_even or any(width % widths[0] for width in widths):
        raise shapes.refuse(f"levels of resnets {' + '.join('x'.join(map(str, level)) or 'none' for level in levels)} wide")
    return {"block_out_channels": widths, "layers_per_block": len(levels[0]), "latent_channels": channels, "has_time": has_time}


def plan_qwen_vae(vae: nn.Module, file: TensorFile, part: Part) -> LoadPlan:
    """Sources of its parameters."""
    if part.layout is Layout.DIFFUSERS:
        return plan_as_named(vae, file, lambda key: part.prefix + key)
    layers = int(cast("Any", vae).config.layers_per_block)
    return plan_as_named(vae, file, lambda key: part.prefix + original_name(key, layers))


def vae_to_file(vae: Any) -> dict[str, Tensor]:
    """A VAE's weights in Wan's layout."""
    return {original_name(key, int(vae.config.layers_per_block)): tensor for key, tensor in vae.state_dict().items()}


_WHOLE = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
_HALF = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
_RESNET = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6", "conv_shortcut": "shortcut"}


def original_name(key: str, layers_per_block: int) -> str:
    """A weight's name in Wan's layout."""
    match key.split("."):
        case [name, leaf]:
            return f"{_WHOLE[name]}.{leaf}"
        case [half, name, leaf]:
            return f"{half}.{_HALF[name]}.{leaf}"
        case [half, "mid_block", kind, number, *rest]:
            place = 1 if kind == "attentions" else 2 * int(number)
            return ".".join([half, "middle", str(place), *_in_resnet(rest)])
        case ["encoder", "down_blocks", number, *rest]:
            return ".".join(["encoder", "downsamples", number, *_in_resnet(rest)])
        case ["decoder", "up_blocks", level, kind, number, *rest]:
            place = int(level) * (layers_per_block + 2) + (int(number) if kind == "resnets" else layers_per_block + 1)
            return ".".join(["decoder", "upsamples", str(place), *_in_resnet(rest)])
    raise KeyError(f"{key} is in no VAE of Qwen-Image")


def _in_resnet(rest: list[str]) -> list[str]:
    return [_RESNET.get(rest[0], rest[0]), *rest[1:]]
