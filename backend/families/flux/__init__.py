"""Flux.1: dev, Krea-dev, Kontext, schnell and Fill. A transformer of double and single blocks, T5-XXL and CLIP-L, latents of 16 channels.

Reading order: `identify` (which files), `key_map` (names), `program` (the network in segments) with `vector_segments` and `tiles`, `text`
(prompts), `controlnet_files`, and here what they make.

Example: `double_blocks.0.img_attn.qkv.weight` in a file tells `identify` the width, and by `key_map` it is three matrices of ours. A picture of
1024x1024 is 4096 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from backend.checkpoint_file import TensorFile
from backend.checkpoint_prediction import FLOW, PredictionSpec
from backend.families.family import Family, FoundDenoiser, Guidance, PageDefaults
from backend.families.flux.identify import LATENT_CHANNELS, identify_flux
from backend.families.flux.key_map import flux_key_map
from backend.families.flux.program import CELL, build_flux_program
from backend.families.flux.text import TEXT_ENCODERS, build_text_engines, build_token_counter, encode
from backend.families.inpainting import mask_behind_picture
from backend.families.latent_format import LatentFormat
from backend.families.unet_family import kl_vae
from backend.key_layout import UNET_PREFIX, clip_to_text_model, vae_to_ldm
from backend.modules.k_prediction import FlowPrediction, mu_of_tokens, shift_from_mu
from backend.nn.flux import IntegratedFluxTransformer2DModel
from backend.state_dict import build_empty

TITLE = "Flux.1"
LATENT = LatentFormat(channels=LATENT_CHANNELS, factor=8, scale=0.3611, shift=0.1159, cell=CELL)
"""A preview's colours are fitted to the VAE."""
MU, SCHNELL_MU = 1.15, 1.0
"""Forge's, at every size: 1.15 is the published line's value at 1024x1024; schnell was published without a shift."""
TABLE_LENGTH = 10000
"""Forge's, from which schedules such as Simple pick their levels."""
DISTILLED_CFG = 3.5
_TEXT_PREFIXES = ("text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.")


def _identify(file: TensorFile) -> FoundDenoiser | None:
    found = identify_flux(file)
    return None if found is None else found[1]


def _build(found: FoundDenoiser) -> nn.Module:
    return build_empty(lambda: cast("nn.Module", IntegratedFluxTransformer2DModel(**found.config)))


def _find_prediction(file: TensorFile, found: FoundDenoiser, network: nn.Module) -> PredictionSpec:
    mu = MU if found.config["guidance_embeds"] else SCHNELL_MU
    return PredictionSpec(kind=FLOW, shift=shift_from_mu(mu), source="the family's rule")


def join_flux(denoiser: nn.Module, vae: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, Tensor]:
    """An all-in-one file's tensors: the transformer as Black Forest Labs names it, VAE and text encoders under the names that other UIs read."""
    config: Any = vae.config
    clip, t5 = encoders
    parts = (
        (UNET_PREFIX, flux_key_map(denoiser).to_original(denoiser.state_dict())),
        ("vae.", vae_to_ldm(vae.state_dict(), config)),
        (_TEXT_PREFIXES[0], clip_to_text_model(clip.state_dict())),
        (_TEXT_PREFIXES[1], {_t5_name(key): tensor for key, tensor in t5.state_dict().items()}),
    )
    return {prefix + key: tensor.detach().contiguous() for prefix, tensors in parts for key, tensor in tensors.items()}


def _t5_name(key: str) -> str:
    """T5's table of tokens has this name in files."""
    return "shared.weight" if key == "encoder.embed_tokens.weight" else key


FAMILY = Family(
    name="flux",
    title=TITLE,
    line=TITLE,
    rank=40,
    identify=_identify,
    build_denoiser=_build,
    key_map=flux_key_map,
    build_program=build_flux_program,
    text_encoders=TEXT_ENCODERS,
    vae=replace(kl_vae(LATENT, TITLE), usual_file="ae.safetensors (0.34 GB)"),
    latent=LATENT,
    find_prediction=_find_prediction,
    make_predictor=lambda prediction: FlowPrediction(shift=prediction.shift, multiplier=1.0, timesteps=TABLE_LENGTH),
    native_size_px=lambda prediction: 1024,
    build_text_engines=build_text_engines,
    encode=encode,
    join_checkpoint=join_flux,
    join_inpaint=partial(mask_behind_picture, factor=LATENT.factor),
    compute_dtypes=(torch.bfloat16, torch.float16, torch.float32),
    attends_jointly=True,
    build_token_counter=build_token_counter,
    shift_of_tokens=lambda tokens, steps: shift_from_mu(mu_of_tokens(tokens)),
    forge_shifts_table_alone=True,
    default_schedule="simple",
    guidance=Guidance(distilled=DISTILLED_CFG),
    defaults=PageDefaults(preset="flux", sampler="Euler", schedule="Simple", steps=20, cfg=1.0, width_px=896, height_px=1152),
    denoiser_title="transformer",
    forge_flags=frozenset({"is_flux"}),
    edit_names=("kontext",),
)
