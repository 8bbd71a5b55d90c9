"""Anima. Cosmos-Predict2's image transformer behind a conditioner for text, Qwen3-0.6B and T5's tokens, Qwen-Image's VAE.

Reading order: `identify` (which files), `key_map` (names), `program` (the network in segments), `text` (prompts), and here what they make.

Example: the conditioner reads T5's token numbers and Qwen3's features of the same prompt, and makes the text that the blocks attend to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from backend.families.anima.identify import TITLE, identify_anima
from backend.families.anima.key_map import anima_key_map
from backend.families.anima.program import build_anima_program
from backend.families.anima.text import TEXT_ENCODERS, build_text_engines, build_token_counter, encode
from backend.families.family import Family, PageDefaults
from backend.families.flow_family import COMPUTE_DTYPES, build_with, flow_predictor, predict_flow
from backend.families.qwen_vae import LATENT, qwen_vae, vae_to_file
from backend.families.single_file import VAE_PREFIX, join_parts
from backend.key_layout import UNET_PREFIX
from backend.nn.anima import AnimaTransformer

SHIFT = 3.0


def join_anima(denoiser: nn.Module, vae: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, Tensor]:
    """An all-in-one file's tensors in the original layout."""
    (qwen3,) = encoders
    return join_parts(
        {
            UNET_PREFIX: anima_key_map(denoiser).to_original(denoiser.state_dict()),
            VAE_PREFIX: vae_to_file(cast("Any", vae)),
            "text_encoders.qwen3_06b.transformer.model.": qwen3.state_dict(),
        }
    )


FAMILY = Family(
    name="anima",
    title=TITLE,
    line=TITLE,
    rank=36,
    identify=identify_anima,
    build_denoiser=build_with(AnimaTransformer),
    key_map=anima_key_map,
    build_program=build_anima_program,
    text_encoders=TEXT_ENCODERS,
    vae=qwen_vae(TITLE),
    latent=LATENT,
    find_prediction=predict_flow(SHIFT),
    make_predictor=flow_predictor(),
    native_size_px=lambda prediction: 1024,
    build_text_engines=build_text_engines,
    encode=encode,
    join_checkpoint=join_anima,
    compute_dtypes=COMPUTE_DTYPES,
    attends_jointly=True,
    build_token_counter=build_token_counter,
    default_schedule="simple",
    defaults=PageDefaults(preset="anima", sampler="Euler", schedule="Simple", steps=30, cfg=4.0, width_px=1024, height_px=1024),
    denoiser_title="transformer",
)
