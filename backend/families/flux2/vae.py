"""Flux.2's VAE in files: in the original layout or diffusers', with the convolutions around the latents inside or outside the halves, and with a
decoder that may be narrower than the encoder. Its latents are normalized by statistics that the file has.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from backend import checkpoint_config
from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part, find_vae
from backend.families.family import Component
from backend.families.file_shapes import read_part
from backend.families.latent_format import LatentFormat
from backend.nn.flux2_vae import MEAN, VARIANCE, LatentStatistics, build_flux2_vae
from backend.state_dict import build_empty, plan_vae

LATENT = LatentFormat(channels=128, factor=16, scale=1.0, fold=2)
"""Without the statistics, which each VAE's file has."""


def flux2_vae(title: str, usual_file: str) -> Component:
    """An AutoencoderKLFlux2 of any width. `title`: the model's that needs it."""
    return Component(
        name="vae",
        title="VAE",
        find=lambda file: [part] if (part := find_vae(file.infos)) is not None else [],
        build=lambda file, part: _build(file, part, title),
        plan=plan_vae,
        usual_file=usual_file,
    )


def latent_of_vae(vae: nn.Module) -> LatentFormat:
    """The latents of a loaded VAE: folded, then normalized per channel by its statistics."""
    statistics: LatentStatistics = cast("Any", vae).statistics
    return LatentFormat(channels=LATENT.channels, factor=LATENT.factor, fold=LATENT.fold, shift=statistics.mean, scale=statistics.scale)


def _build(file: TensorFile, part: Part, title: str) -> nn.Module:
    """Without memory. Raises: CheckpointError for another family's VAE, or one without statistics."""
    config = checkpoint_config.vae_config(file, part, channels=LATENT.vae_channels, scale=1.0, family_title=title)
    del config["scaling_factor"]
    config["decoder_block_out_channels"] = _decoder_widths(file, part, len(config["block_out_channels"]))
    config["use_quant_conv"] = f"{part.prefix}quant_conv.weight" in file.infos or f"{part.prefix}encoder.quant_conv.weight" in file.infos
    config["use_post_quant_conv"] = (
        f"{part.prefix}post_quant_conv.weight" in file.infos or f"{part.prefix}decoder.post_quant_conv.weight" in file.infos
    )
    statistics = _read_statistics(file, part)
    return build_empty(lambda: cast("nn.Module", build_flux2_vae(config, statistics)))


def _decoder_widths(file: TensorFile, part: Part, num_levels: int) -> list[int]:
    """Of the levels from the outermost, as the encoder's."""
    shapes = read_part(file, part, "a Flux.2 VAE")
    if part.layout is Layout.LDM:
        return [shapes.find(f"decoder.up.{level}.block.0.conv1.weight", 4)[0] for level in range(num_levels)]
    return [shapes.find(f"decoder.up_blocks.{num_levels - 1 - level}.resnets.0.conv1.weight", 4)[0] for level in range(num_levels)]


def _read_statistics(file: TensorFile, part: Part) -> LatentStatistics:
    names = [part.prefix + name for name in (MEAN, VARIANCE)]
    for name in names:
        info = file.infos.get(name)
        if info is None or info.shape != (LATENT.channels,):
            raise CheckpointError(
                f"{file.path.name}: its VAE has 32 latent channels, but {'no' if info is None else 'a misshapen'} {name}, by which Flux.2's latents "
                f"are normalized ({LATENT.channels} numbers). Use flux2-vae.safetensors."
            )
    mean_C, variance_C = (file.read(name, dtype=torch.float32) for name in names)
    if not bool(mean_C.isfinite().all() and variance_C.isfinite().all() and (variance_C >= 0).all()):
        raise CheckpointError(f"{file.path.name}: the statistics of its latents ({names[0]}, {names[1]}) are no numbers. Download it again.")
    return LatentStatistics.of(mean_C, variance_C)
