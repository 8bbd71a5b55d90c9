"""SD3 medium and SD3.5: medium, large, large-turbo. A transformer of joint blocks, both of SDXL's CLIPs, optionally T5-XXL, latents of 16
channels.

Reading order: `identify` (which files), `key_map` (names), `layers` and `program` (the network in segments) with `tiles`, `latent`, `text`
(prompts), `controlnet` with `controlnet_files`, and here what they make.

Example: a prompt without T5 is 77 tokens with the features of both CLIPs. Each joint block lets the picture's tokens and the text's attend to one
another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from backend.checkpoint_file import TensorFile
from backend.checkpoint_prediction import FLOW, PredictionSpec
from backend.families.family import Family, FoundDenoiser, PageDefaults, PageVariant
from backend.families.sd3.identify import TITLE, identify_sd3
from backend.families.sd3.key_map import sd3_key_map
from backend.families.sd3.latent import LATENT
from backend.families.sd3.program import build_sd3_program
from backend.families.sd3.text import TEXT_ENCODERS, build_text_engines, encode
from backend.families.single_file import VAE_PREFIX, join_parts, t5_to_file
from backend.families.unet_family import kl_vae
from backend.key_layout import UNET_PREFIX, clip_to_text_model, vae_to_ldm
from backend.modules.k_prediction import FlowPrediction
from backend.nn.mmditx import MMDiTX
from backend.state_dict import build_empty

SHIFT = 3.0
_TEXT_PREFIXES = tuple(f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))


def _build(found: FoundDenoiser) -> nn.Module:
    return build_empty(lambda: cast("nn.Module", MMDiTX(**found.config)))


def _find_prediction(file: TensorFile, found: FoundDenoiser, network: nn.Module) -> PredictionSpec:
    return PredictionSpec(kind=FLOW, shift=SHIFT, source="the family's rule")


def join_sd3(denoiser: nn.Module, vae: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, Tensor]:
    """An all-in-one file's tensors in Stability's layout; without T5 one "including the CLIPs"."""
    writers = (clip_to_text_model, clip_to_text_model, t5_to_file)
    return join_parts(
        {
            UNET_PREFIX: sd3_key_map(denoiser).to_original(denoiser.state_dict()),
            VAE_PREFIX: vae_to_ldm(vae.state_dict(), cast("dict[str, object]", vae.config)),
            **{prefix: write(encoder.state_dict()) for prefix, write, encoder in zip(_TEXT_PREFIXES, writers, encoders)},
        }
    )


FAMILY = Family(
    name="sd3",
    title=TITLE,
    line="SD 3.x",
    rank=42,
    identify=identify_sd3,
    build_denoiser=_build,
    key_map=sd3_key_map,
    build_program=build_sd3_program,
    text_encoders=TEXT_ENCODERS,
    vae=kl_vae(LATENT, TITLE),
    latent=LATENT,
    find_prediction=_find_prediction,
    make_predictor=lambda prediction: FlowPrediction(shift=prediction.shift, multiplier=1000.0, timesteps=1000),
    native_size_px=lambda prediction: 1024,
    build_text_engines=build_text_engines,
    encode=encode,
    join_checkpoint=join_sd3,
    compute_dtypes=(torch.bfloat16, torch.float16, torch.float32),
    text_settings={"sd3_enable_t5": True},
    attends_jointly=True,
    default_schedule="simple",
    defaults=PageDefaults(
        preset="sd3",
        variants=(PageVariant(names=re.compile(r"turbo"), steps=4, cfg=1.0), PageVariant(names=re.compile(r"medium"), steps=20, cfg=5.0)),
        sampler="Euler",
        schedule="SGM Uniform",
        steps=20,
        cfg=4.5,
        width_px=1024,
        height_px=1024,
    ),
    denoiser_title="transformer",
    forge_flags=frozenset({"is_sd3"}),
)
