"""Z-Image and Z-Image-Turbo. A transformer with one stream after two refiners, Qwen3-4B, Flux.1's VAE.

Reading order: `identify` (which files), `key_map` (names), `program` (the network in segments), `text` (prompts), and here what they make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from backend.checkpoint_file import TensorFile
from backend.checkpoint_prediction import FLOW, PredictionSpec
from backend.families.family import Family, FoundDenoiser, PageDefaults, PageVariant
from backend.families.flux import LATENT
from backend.families.single_file import VAE_PREFIX, join_parts
from backend.families.unet_family import kl_vae
from backend.families.zimage.identify import TITLE, identify_zimage
from backend.families.zimage.key_map import zimage_key_map
from backend.families.zimage.program import build_zimage_program
from backend.families.zimage.text import TEXT_ENCODERS, build_text_engines, build_token_counter, encode
from backend.key_layout import UNET_PREFIX, vae_to_ldm
from backend.modules.k_prediction import FlowPrediction
from backend.nn.zimage import ZImageTransformer
from backend.state_dict import build_empty

SHIFT = 3.0
BASE_NAMES = r"base|^z[-_ ]?image([-_ .](bf16|fp16|fp8|q\d|int8).*)?$"
"""Of files that are not Turbo: fine-tunes whose names say nothing are Turbo's."""


def _build(found: FoundDenoiser) -> nn.Module:
    return build_empty(lambda: cast("nn.Module", ZImageTransformer(**found.config)))


def _find_prediction(file: TensorFile, found: FoundDenoiser, network: nn.Module) -> PredictionSpec:
    return PredictionSpec(kind=FLOW, shift=SHIFT, source="the family's rule")


def join_zimage(denoiser: nn.Module, vae: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, Tensor]:
    """An all-in-one file's tensors in the original layout."""
    (qwen3,) = encoders
    return join_parts(
        {
            UNET_PREFIX: zimage_key_map(denoiser).to_original(denoiser.state_dict()),
            VAE_PREFIX: vae_to_ldm(vae.state_dict(), cast("dict[str, object]", vae.config)),
            "text_encoders.qwen3_4b.transformer.model.": qwen3.state_dict(),
        }
    )


FAMILY = Family(
    name="zimage",
    title=TITLE,
    line=TITLE,
    rank=35,
    identify=identify_zimage,
    build_denoiser=_build,
    key_map=zimage_key_map,
    build_program=build_zimage_program,
    text_encoders=TEXT_ENCODERS,
    vae=replace(kl_vae(LATENT, TITLE), usual_file="ae.safetensors (0.34 GB)"),
    latent=LATENT,
    find_prediction=_find_prediction,
    make_predictor=lambda prediction: FlowPrediction(shift=prediction.shift, multiplier=1.0, timesteps=1000, time_is_clean=True),
    native_size_px=lambda prediction: 1024,
    build_text_engines=build_text_engines,
    encode=encode,
    join_checkpoint=join_zimage,
    compute_dtypes=(torch.bfloat16, torch.float16, torch.float32),
    attends_jointly=True,
    build_token_counter=build_token_counter,
    default_schedule="simple",
    defaults=PageDefaults(
        preset="zit",
        variants=(PageVariant(names=BASE_NAMES, steps=25, cfg=4.0),),
        sampler="Euler",
        schedule="Simple",
        steps=9,
        cfg=1.0,
        width_px=1024,
        height_px=1024,
    ),
    denoiser_title="transformer",
)
