"""Z-Image and Z-Image-Turbo. A transformer with one stream after two refiners, Qwen3-4B, Flux.1's VAE.

Reading order: `identify` (which files), `key_map` (names), `layers` and `program` (the network in segments), `text` (prompts), `controlnet` with
`controlnet_files`, and here what they make.

Example: "a cat" is asked as a question in a chat, and its tokens are padded to a multiple of 32 with a token that the network has learned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from backend.families.family import Family, PageDefaults, PageVariant
from backend.families.flow_family import COMPUTE_DTYPES, build_with, flow_predictor, join_original, predict_flow
from backend.families.flux import LATENT
from backend.families.unet_family import kl_vae
from backend.families.zimage.identify import TITLE, identify_zimage
from backend.families.zimage.key_map import zimage_key_map
from backend.families.zimage.program import build_zimage_program
from backend.families.zimage.text import TEXT_ENCODERS, build_text_engines, build_token_counter, encode
from backend.nn.zimage import ZImageTransformer

SHIFT = 3.0
BASE_NAMES = re.compile(r"base|^z[-_ ]?image(?:$|[-_ .](?:bf16|fp16|fp8|q\d|int8))")
"""Of files that are not Turbo: fine-tunes whose names say nothing are Turbo's."""


def join_zimage(denoiser: nn.Module, vae: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, Tensor]:
    """An all-in-one file's tensors in the original layout."""
    (qwen3,) = encoders
    return join_original(denoiser, zimage_key_map, vae, {"text_encoders.qwen3_4b.transformer.model.": qwen3.state_dict()})


FAMILY = Family(
    name="zimage",
    title=TITLE,
    line=TITLE,
    rank=35,
    identify=identify_zimage,
    build_denoiser=build_with(ZImageTransformer),
    key_map=zimage_key_map,
    build_program=build_zimage_program,
    text_encoders=TEXT_ENCODERS,
    vae=replace(kl_vae(LATENT, TITLE), usual_file="ae.safetensors (0.34 GB)"),
    latent=LATENT,
    find_prediction=predict_flow(SHIFT),
    make_predictor=flow_predictor(time_is_clean=True),
    native_size_px=lambda prediction: 1024,
    build_text_engines=build_text_engines,
    encode=encode,
    join_checkpoint=join_zimage,
    compute_dtypes=COMPUTE_DTYPES,
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
