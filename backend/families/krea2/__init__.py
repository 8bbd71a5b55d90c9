"""Krea 2: Raw and Turbo. A transformer with one stream and grouped attention, Qwen3-VL-4B's features of twelve layers, Qwen-Image's VAE.

Reading order: `identify` (which files), `key_map` (names), `program` (the network in segments), `text` (prompts), and here what they make.

Example: a prompt's tokens have the features of twelve of Qwen3-VL's layers, which the transformer's first segments fuse to one text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

from diffusers import Krea2Transformer2DModel
from torch import Tensor, nn

from backend.families.family import Family, PageDefaults, PageVariant
from backend.families.flow_family import COMPUTE_DTYPES, build_with, flow_predictor, predict_flow
from backend.families.flux import TABLE_LENGTH
from backend.families.krea2.identify import TITLE, identify_krea2
from backend.families.krea2.key_map import TABLE, krea2_key_map
from backend.families.krea2.program import build_krea2_program
from backend.families.krea2.text import TEXT_ENCODERS, build_text_engines, build_token_counter, encode
from backend.families.qwen_text import VL_FILE_PREFIX
from backend.families.qwen_vae import LATENT, qwen_vae, vae_to_file
from backend.families.single_file import VAE_PREFIX, join_parts
from backend.key_layout import UNET_PREFIX
from backend.modules.k_prediction import mu_of_tokens, shift_from_mu

MU = 1.15
"""Turbo's at every size, and other UIs' for both."""
FEW_TOKENS, MANY_TOKENS = (256, 0.5), (6400, 1.15)
"""The authors' line of mu for Raw."""


def _shift_of_tokens(tokens: int, steps: int) -> float:
    return shift_from_mu(mu_of_tokens(tokens, few=FEW_TOKENS, many=MANY_TOKENS))


def join_krea2(denoiser: nn.Module, vae: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, Tensor]:
    """An all-in-one file's tensors in the original layout, where a block's table of modulations has no rows."""
    (qwen3_vl,) = encoders
    state = {key: tensor.flatten() if _is_block_table(key) else tensor for key, tensor in denoiser.state_dict().items()}
    return join_parts(
        {
            UNET_PREFIX: krea2_key_map(denoiser).to_original(state),
            VAE_PREFIX: vae_to_file(cast("Any", vae)),
            VL_FILE_PREFIX: qwen3_vl.state_dict(),
        }
    )


def _is_block_table(key: str) -> bool:
    return key.startswith("transformer_blocks.") and key.endswith(TABLE)


FAMILY = Family(
    name="krea2",
    title=TITLE,
    line=TITLE,
    rank=33,
    identify=identify_krea2,
    build_denoiser=build_with(Krea2Transformer2DModel),
    key_map=krea2_key_map,
    build_program=build_krea2_program,
    text_encoders=TEXT_ENCODERS,
    vae=qwen_vae(TITLE),
    latent=LATENT,
    find_prediction=predict_flow(shift_from_mu(MU)),
    make_predictor=flow_predictor(timesteps=TABLE_LENGTH),
    native_size_px=lambda prediction: 1024,
    build_text_engines=build_text_engines,
    encode=encode,
    join_checkpoint=join_krea2,
    compute_dtypes=COMPUTE_DTYPES,
    attends_jointly=True,
    build_token_counter=build_token_counter,
    shift_of_tokens=_shift_of_tokens,
    default_schedule="simple",
    defaults=PageDefaults(
        preset="krea",
        variants=(PageVariant(names=re.compile(r"raw"), steps=28, cfg=5.5),),
        sampler="Euler",
        schedule="Simple",
        steps=8,
        cfg=1.0,
        width_px=1024,
        height_px=1024,
    ),
    denoiser_title="transformer",
)
