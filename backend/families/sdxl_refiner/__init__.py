"""The SDXL refiner: bigG only, and an aesthetic score instead of the target size.

The text recipe is in `sdxl_text`, everything else in `unet_family`. Example: a file whose UNet takes text of 1280 numbers per token is this
family's.
"""

from __future__ import annotations

from functools import partial

from backend.families.family import Family, PageDefaults
from backend.families.latent_format import LatentFormat
from backend.families.sdxl_text import AESTHETIC_SCORE_NEGATIVE, AESTHETIC_SCORE_POSITIVE, build_refiner_engines, encode_refiner
from backend.families.unet_family import (
    build_unet,
    build_unet_program,
    clip_g,
    find_unet_prediction,
    identify_unet,
    is_the_only_one,
    join_unet_checkpoint,
    kl_vae,
    make_discrete_predictor,
    unet_key_map,
)
from backend.key_layout import REFINER_OPEN_CLIP_PREFIX, clip_to_open_clip

LATENT = LatentFormat(channels=4, factor=8, scale=0.13025)

FAMILY = Family(
    name="sdxl_refiner",
    title="SDXL refiner",
    line="SDXL",
    rank=10,
    identify=partial(identify_unet, name="sdxl_refiner"),
    build_denoiser=build_unet,
    key_map=unet_key_map,
    build_program=build_unet_program,
    text_encoders=(clip_g(is_the_only_one),),
    vae=kl_vae(LATENT, "SDXL refiner"),
    latent=LATENT,
    find_prediction=find_unet_prediction,
    make_predictor=make_discrete_predictor,
    native_size_px=lambda prediction: 1024,
    build_text_engines=build_refiner_engines,
    encode=encode_refiner,
    join_checkpoint=partial(join_unet_checkpoint, ((REFINER_OPEN_CLIP_PREFIX, clip_to_open_clip),)),
    text_settings={
        "sdxl_crop_top": 0,
        "sdxl_crop_left": 0,
        "sdxl_refiner_high_aesthetic_score": AESTHETIC_SCORE_POSITIVE,
        "sdxl_refiner_low_aesthetic_score": AESTHETIC_SCORE_NEGATIVE,
    },
    reads_size=True,
    defaults=PageDefaults(preset="xl", width_px=1024, height_px=1024),
    forge_flags=frozenset({"is_sdxl"}),
)
