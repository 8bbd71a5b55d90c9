"""Lumina2: Lumina-Image-2.0, Neta Lumina, NetaYume. A transformer with one stream after two refiners, Gemma2-2B, Flux.1's VAE.

Reading order: `identify` (which files), `key_map` (names), `program` (the network in segments), `text` (prompts), and here what they make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from diffusers import Lumina2Transformer2DModel
from torch import Tensor, nn

from backend.checkpoint_file import TensorFile
from backend.checkpoint_prediction import FLOW, PredictionSpec
from backend.families.family import Family, FoundDenoiser, PageDefaults
from backend.families.flux import LATENT
from backend.families.gemma_text import TOKENIZER
from backend.families.lumina2.identify import TITLE, identify_lumina2
from backend.families.lumina2.key_map import lumina2_key_map
from backend.families.lumina2.program import build_lumina2_program
from backend.families.lumina2.text import TEXT_ENCODERS, build_text_engines, encode
from backend.families.single_file import VAE_PREFIX, join_parts
from backend.families.unet_family import kl_vae
from backend.key_layout import UNET_PREFIX, vae_to_ldm
from backend.modules.k_prediction import FlowPrediction
from backend.state_dict import build_empty

SHIFT = 6.0


def _build(found: FoundDenoiser) -> nn.Module:
    return build_empty(lambda: cast("nn.Module", Lumina2Transformer2DModel(**found.config)))


def _find_prediction(file: TensorFile, found: FoundDenoiser, network: nn.Module) -> PredictionSpec:
    return PredictionSpec(kind=FLOW, shift=SHIFT, source="the family's rule")


def join_lumina2(denoiser: nn.Module, vae: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, Tensor]:
    """An all-in-one file's tensors in the original layout, Gemma2's tokenizer among them."""
    gemma2: Any = encoders[0]
    return join_parts(
        {
            UNET_PREFIX: lumina2_key_map(denoiser).to_original(denoiser.state_dict()),
            VAE_PREFIX: vae_to_ldm(vae.state_dict(), cast("dict[str, object]", vae.config)),
            "text_encoders.gemma2_2b.transformer.model.": gemma2.state_dict(),
            "text_encoders.gemma2_2b.": {TOKENIZER: gemma2.tokenizer_bytes},
        }
    )


FAMILY = Family(
    name="lumina2",
    title=TITLE,
    line=TITLE,
    rank=34,
    identify=identify_lumina2,
    build_denoiser=_build,
    key_map=lumina2_key_map,
    build_program=build_lumina2_program,
    text_encoders=TEXT_ENCODERS,
    vae=replace(kl_vae(LATENT, TITLE), usual_file="ae.safetensors (0.34 GB)"),
    latent=LATENT,
    find_prediction=_find_prediction,
    make_predictor=lambda prediction: FlowPrediction(shift=prediction.shift, multiplier=1.0, timesteps=1000, time_is_clean=True),
    native_size_px=lambda prediction: 1024,
    build_text_engines=build_text_engines,
    encode=encode,
    join_checkpoint=join_lumina2,
    compute_dtypes=(torch.bfloat16, torch.float16, torch.float32),
    attends_jointly=True,
    default_schedule="simple",
    defaults=PageDefaults(preset="lumina", sampler="Euler", schedule="Simple", steps=30, cfg=4.0, width_px=1024, height_px=1024),
    denoiser_title="transformer",
)
