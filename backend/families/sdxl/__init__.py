"""SDXL base and its inpainting variant, noise or velocity prediction.

The text recipe is in `sdxl_text`, everything else in `unet_family`. Example: a file whose UNet takes text of 2048 numbers per token and a vector of
2816 is this family's.
"""

from __future__ import annotations

from functools import partial

from backend.families.family import Family, PageDefaults
from backend.families.latent_format import LatentFormat
from backend.families.sdxl_text import build_base_engines, encode_base
from backend.families.unet_family import (
    build_unet,
    build_unet_program,
    clip_g,
    clip_l,
    find_unet_prediction,
    identify_unet,
    is_slot,
    join_unet_checkpoint,
    kl_vae,
    make_discrete_predictor,
    unet_key_map,
)
from backend.key_layout import SDXL_CLIP_L_PREFIX, SDXL_OPEN_CLIP_PREFIX, clip_to_open_clip, clip_to_text_model

LATENT = LatentFormat(channels=4, factor=8, scale=0.13025)

FAMILY = Family(
    name="sdxl",
    title="SDXL",
    line="SDXL",
    rank=20,
    identify=partial(identify_unet, name="sdxl"),
    build_denoiser=build_unet,
    key_map=unet_key_map,
    build_program=build_unet_program,
    text_encoders=(clip_l(is_slot("clip_l")), clip_g(is_slot("clip_g"))),
    vae=kl_vae(LATENT, "SDXL"),
    latent=LATENT,
    find_prediction=find_unet_prediction,
    make_predictor=make_discrete_predictor,
    native_size_px=lambda prediction: 1024,
    build_text_engines=build_base_engines,
    encode=encode_base,
    join_checkpoint=partial(join_unet_checkpoint, ((SDXL_CLIP_L_PREFIX, clip_to_text_model), (SDXL_OPEN_CLIP_PREFIX, clip_to_open_clip))),
    text_settings={"sdxl_crop_top": 0, "sdxl_crop_left": 0},
    reads_size=True,
    defaults=PageDefaults(preset="xl", width_px=1024, height_px=1024),
    forge_flags=frozenset({"is_sdxl"}),
)
