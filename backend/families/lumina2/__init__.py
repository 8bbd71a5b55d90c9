"""Lumina2: Lumina-Image-2.0, Neta Lumina, NetaYume. A transformer with one stream after two refiners, Gemma2-2B, Flux.1's VAE.

Reading order: `identify` (which files), `key_map` (names), `program` (the network in segments), `guidance` (what CFG keeps), `text` (prompts), and
here what they make.

Example: "a cat" is put behind the published instruction. Two refiners bring text and picture to one width, and the other blocks read both as one
sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffusers import Lumina2Transformer2DModel
from torch import Tensor, nn

from backend.families.family import Family, Guidance, PageDefaults
from backend.families.flow_family import COMPUTE_DTYPES, build_with, flow_predictor, join_original, predict_flow
from backend.families.flux import LATENT
from backend.families.gemma_text import TOKENIZER
from backend.families.lumina2.guidance import keep_row_lengths
from backend.families.lumina2.identify import TITLE, identify_lumina2
from backend.families.lumina2.key_map import lumina2_key_map
from backend.families.lumina2.program import build_lumina2_program
from backend.families.lumina2.text import TEXT_ENCODERS, build_text_engines, encode
from backend.families.unet_family import kl_vae

SHIFT = 6.0


def join_lumina2(denoiser: nn.Module, vae: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, Tensor]:
    """An all-in-one file's tensors in the original layout, Gemma2's tokenizer among them."""
    gemma2: Any = encoders[0]
    tokenizer = {"text_encoders.gemma2_2b.": {TOKENIZER: gemma2.tokenizer_bytes}}
    return join_original(denoiser, lumina2_key_map, vae, {"text_encoders.gemma2_2b.transformer.model.": gemma2.state_dict(), **tokenizer})


FAMILY = Family(
    name="lumina2",
    title=TITLE,
    line=TITLE,
    rank=34,
    identify=identify_lumina2,
    build_denoiser=build_with(Lumina2Transformer2DModel),
    key_map=lumina2_key_map,
    build_program=build_lumina2_program,
    text_encoders=TEXT_ENCODERS,
    vae=replace(kl_vae(LATENT, TITLE), usual_file="ae.safetensors (0.34 GB)"),
    latent=LATENT,
    find_prediction=predict_flow(SHIFT),
    make_predictor=flow_predictor(time_is_clean=True),
    native_size_px=lambda prediction: 1024,
    build_text_engines=build_text_engines,
    encode=encode,
    join_checkpoint=join_lumina2,
    compute_dtypes=COMPUTE_DTYPES,
    attends_jointly=True,
    default_schedule="simple",
    guidance=Guidance(rescale=keep_row_lengths),
    defaults=PageDefaults(preset="lumina", sampler="Euler", schedule="Simple", steps=30, cfg=4.0, width_px=1024, height_px=1024),
    denoiser_title="transformer",
)
