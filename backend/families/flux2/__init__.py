"""Flux.2-klein: 4B and 9B, distilled and base. Flux.1's blocks with shared modulations, Qwen3, and a VAE whose latents are folded and normalized.

Reading order: `identify` (which files), `key_map` (names), `program` (the network in segments), `tiles`, `text` (prompts), `vae` (latents), and
here what they make.

Example: a picture of 1024x1024 has latents of 32 channels and 128x128, folded to 128 channels and 64x64: 4096 tokens, as many as a reference
picture of that size adds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from backend.families.family import Family, PageDefaults, PageVariant
from backend.families.flow_family import COMPUTE_DTYPES, build_with, flow_predictor, join_original, predict_flow
from backend.families.flux import TABLE_LENGTH
from backend.families.flux2.identify import TITLE, identify_flux2
from backend.families.flux2.key_map import flux2_key_map
from backend.families.flux2.program import build_flux2_program
from backend.families.flux2.text import TEXT_ENCODERS, build_text_engines, build_token_counter, encode
from backend.families.flux2.vae import LATENT, flux2_vae, latent_of_vae
from backend.families.single_file import VAE_PREFIX
from backend.modules.k_prediction import mu_of_tokens, shift_from_mu
from backend.nn.flux2 import IntegratedFlux2Transformer2DModel

MU = 2.02
"""Where no picture's size is known; the authors' value at 1024x1024 in 50 steps."""
MANY_TOKENS = 4300
"""Beyond these, mu does not depend on the number of steps."""


def mu_of(tokens: int, steps: int) -> float:
    """The authors' mu: a line in the number of steps through mu at 10 and at 200 of them, which are lines in the number of tokens."""
    at_200 = mu_of_tokens(tokens, few=(0, 0.45666666), many=(10_000, 0.45666666 + 1.6927))
    if tokens > MANY_TOKENS:
        return at_200
    at_10 = mu_of_tokens(tokens, few=(0, 1.89833333), many=(10_000, 1.89833333 + 0.873809524))
    return at_10 + (at_200 - at_10) * (steps - 10) / 190


def join_flux2(denoiser: nn.Module, vae: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, Tensor]:
    """An all-in-one file's tensors in the original layout, the statistics of the VAE's latents among them."""
    (qwen3,), own_vae = encoders, cast("Any", vae)
    texts = {"text_encoders.qwen3_4b.transformer.model.": qwen3.state_dict()}
    statistics = {"": {VAE_PREFIX + name: tensor for name, tensor in own_vae.statistics.to_file().items()}}
    return join_original(denoiser, flux2_key_map, vae, {**texts, **statistics})


FAMILY = Family(
    name="flux2",
    title=TITLE,
    line=TITLE,
    rank=38,
    identify=identify_flux2,
    build_denoiser=build_with(IntegratedFlux2Transformer2DModel),
    key_map=flux2_key_map,
    build_program=build_flux2_program,
    text_encoders=TEXT_ENCODERS,
    vae=flux2_vae(TITLE, "flux2-vae.safetensors (0.34 GB)"),
    latent=LATENT,
    latent_of_vae=latent_of_vae,
    find_prediction=predict_flow(shift_from_mu(MU)),
    make_predictor=flow_predictor(timesteps=TABLE_LENGTH),
    native_size_px=lambda prediction: 1024,
    build_text_engines=build_text_engines,
    encode=encode,
    join_checkpoint=join_flux2,
    compute_dtypes=COMPUTE_DTYPES,
    attends_jointly=True,
    build_token_counter=build_token_counter,
    shift_of_tokens=lambda tokens, steps: shift_from_mu(mu_of(tokens, steps)),
    always_shifts_by_size=True,
    default_schedule="simple",
    defaults=PageDefaults(
        preset="klein",
        variants=(PageVariant(names=re.compile(r"base"), steps=20, cfg=5.0),),
        sampler="Euler",
        schedule="Simple",
        steps=4,
        cfg=1.0,
        width_px=1024,
        height_px=1024,
    ),
    denoiser_title="transformer",
)
