"""Stable Diffusion 1.x and its inpainting variant; also its narrow variants.

Everything but the text encoder, CLIP-L, is that of `unet_family`. Example: a file whose UNet takes text of 768 numbers per token is this family's.
"""

from __future__ import annotations

from functools import partial

from backend.families.family import Family, PageDefaults
from backend.families.latent_format import LatentFormat
from backend.families.unet_family import (
    build_unet,
    build_unet_program,
    clip_l,
    encode_text_alone,
    find_unet_prediction,
    identify_unet,
    is_the_only_one,
    join_unet_checkpoint,
    kl_vae,
    make_discrete_predictor,
    unet_key_map,
)
from backend.key_layout import CLIP_L_PREFIX, clip_to_text_model
from backend.text_processing.classic_engine import ClassicTextProcessingEngine

LATENT = LatentFormat(channels=4, factor=8, scale=0.18215)

FAMILY = Family(
    name="sd15",
    title="SD 1.x",
    line="SD 1.x",
    rank=40,
    identify=partial(identify_unet, name="sd15"),
    build_denoiser=build_unet,
    key_map=unet_key_map,
    build_program=build_unet_program,
    text_encoders=(clip_l(is_the_only_one),),
    vae=kl_vae(LATENT, "SD 1.x"),
    latent=LATENT,
    find_prediction=find_unet_prediction,
    make_predictor=make_discrete_predictor,
    native_size_px=lambda prediction: 512,
    build_text_engines=lambda encoders, tokenizers, embeddings: [
        ClassicTextProcessingEngine(encoders["clip_l"], tokenizers["clip_l"], embedding_key="clip_l", embeddings=embeddings)
    ],
    encode=encode_text_alone,
    join_checkpoint=partial(join_unet_checkpoint, ((CLIP_L_PREFIX, clip_to_text_model),)),
    defaults=PageDefaults(preset="sd"),
    forge_flags=frozenset({"is_sd1"}),
)
