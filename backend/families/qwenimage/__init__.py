"""Qwen-Image, Qwen-Image-2512 and Qwen-Image-Edit (also 2509, 2511). A transformer with two streams, Qwen2.5-VL-7B, Wan 2.1's VAE.

Reading order: `identify` (which files), `program` (the network in segments), `guidance` (what CFG keeps), `text` (prompts and pictures), and here
what they make. The original files have diffusers' names, so there is no key map.

Example: with CFG 4, `guidance` adds four times the difference of prompt and negative prompt, and gives every token of the result the length that
the prompt's had.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from backend.families.family import Family, Guidance, PageDefaults, PageVariant
from backend.families.flow_family import COMPUTE_DTYPES, build_with, flow_predictor, predict_flow
from backend.families.flux import TABLE_LENGTH
from backend.families.key_map import KeyMap
from backend.families.qwen_vae import LATENT, qwen_vae, vae_to_file
from backend.families.qwen_vl_text import FILE_PREFIX, name_in_file
from backend.families.qwenimage.guidance import keep_flow_length
from backend.families.qwenimage.identify import CLEAN_REFERENCES, TITLE, identify_qwenimage
from backend.families.qwenimage.program import build_qwen_program
from backend.families.qwenimage.text import EDIT_NAMES, TEXT_ENCODERS, build_text_engines, build_token_counter, encode
from backend.families.single_file import VAE_PREFIX, join_parts
from backend.key_layout import UNET_PREFIX
from backend.modules.k_prediction import mu_of_tokens, shift_from_mu

MU = 1.15
"""As other UIs have it, at every size."""
FEW_TOKENS, MANY_TOKENS = (256, 0.5), (8192, 0.9)
"""The authors' line of mu."""


def _shift_of_tokens(tokens: int, steps: int) -> float:
    return shift_from_mu(mu_of_tokens(tokens, few=FEW_TOKENS, many=MANY_TOKENS))


def join_qwenimage(denoiser: nn.Module, vae: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, Tensor]:
    """An all-in-one file's tensors: the VAE in Wan's layout, the text encoder under the name that other UIs read."""
    (qwen,) = encoders
    transformer = denoiser.state_dict()
    if cast("Any", denoiser).config.zero_cond_t:
        transformer[CLEAN_REFERENCES] = torch.zeros(1)
    return join_parts(
        {
            UNET_PREFIX: transformer,
            VAE_PREFIX: vae_to_file(cast("Any", vae)),
            "": {name_in_file(key, f"{FILE_PREFIX}model."): tensor for key, tensor in qwen.state_dict().items()},
        }
    )


FAMILY = Family(
    name="qwenimage",
    title=TITLE,
    line=TITLE,
    rank=37,
    identify=identify_qwenimage,
    build_denoiser=build_with(QwenImageTransformer2DModel),
    key_map=lambda network: KeyMap(),
    build_program=build_qwen_program,
    text_encoders=TEXT_ENCODERS,
    vae=qwen_vae(TITLE),
    latent=LATENT,
    find_prediction=predict_flow(shift_from_mu(MU)),
    make_predictor=flow_predictor(timesteps=TABLE_LENGTH),
    native_size_px=lambda prediction: 1024,
    build_text_engines=build_text_engines,
    encode=encode,
    join_checkpoint=join_qwenimage,
    compute_dtypes=COMPUTE_DTYPES,
    attends_jointly=True,
    build_token_counter=build_token_counter,
    shift_of_tokens=_shift_of_tokens,
    default_schedule="simple",
    guidance=Guidance(rescale=keep_flow_length),
    reads_pictures=True,
    defaults=PageDefaults(
        preset="qwen",
        variants=(PageVariant(names=re.compile(r"lightning"), steps=8, cfg=1.0),),
        sampler="Euler",
        schedule="Simple",
        steps=50,
        cfg=4.0,
        width_px=1328,
        height_px=1328,
    ),
    denoiser_title="transformer",
    edit_names=EDIT_NAMES,
)
