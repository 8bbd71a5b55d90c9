"""Chroma: Chroma1-HD, Chroma1-Base and their fine-tunes. Flux.1's parts with true CFG: one modulation net for all blocks, T5-XXL alone.

Reading order: `identify` (which files), `key_map` (names), `program` (the network in segments), `text` (prompts), and here what they make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from backend.checkpoint_file import TensorFile
from backend.checkpoint_prediction import FLOW, PredictionSpec
from backend.families.chroma.identify import TITLE, identify_chroma
from backend.families.chroma.key_map import chroma_key_map
from backend.families.chroma.program import build_chroma_program
from backend.families.chroma.text import TEXT_ENCODERS, build_text_engines, build_token_counter, encode
from backend.families.family import Family, FoundDenoiser, PageDefaults
from backend.families.flux import FAMILY as FLUX
from backend.families.flux import LATENT, TABLE_LENGTH
from backend.families.single_file import VAE_PREFIX, join_parts, t5_to_file
from backend.families.unet_family import kl_vae
from backend.key_layout import UNET_PREFIX, vae_to_ldm
from backend.modules.k_prediction import FlowPrediction, shift_from_mu
from backend.nn.chroma import IntegratedChromaTransformer2DModel
from backend.state_dict import build_empty

MU = 1.0
"""Forge's. The authors' own pipeline shifts by 1, that is not at all."""


def _build(found: FoundDenoiser) -> nn.Module:
    return build_empty(lambda: cast("nn.Module", IntegratedChromaTransformer2DModel(**found.config)))


def _find_prediction(file: TensorFile, found: FoundDenoiser, network: nn.Module) -> PredictionSpec:
    return PredictionSpec(kind=FLOW, shift=shift_from_mu(MU), source="the family's rule")


def join_chroma(denoiser: nn.Module, vae: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, Tensor]:
    """An all-in-one file's tensors: the transformer in the original layout, VAE and T5 under the names that other UIs read."""
    (t5,) = encoders
    return join_parts(
        {
            UNET_PREFIX: chroma_key_map(denoiser).to_original(denoiser.state_dict()),
            VAE_PREFIX: vae_to_ldm(vae.state_dict(), cast("dict[str, object]", vae.config)),
            "text_encoders.t5xxl.transformer.": t5_to_file(t5.state_dict()),
        }
    )


FAMILY = Family(
    name="chroma",
    title=TITLE,
    line=TITLE,
    rank=39,
    identify=identify_chroma,
    build_denoiser=_build,
    key_map=chroma_key_map,
    build_program=build_chroma_program,
    text_encoders=TEXT_ENCODERS,
    vae=replace(kl_vae(LATENT, TITLE), usual_file="ae.safetensors (0.34 GB)"),
    latent=LATENT,
    find_prediction=_find_prediction,
    make_predictor=lambda prediction: FlowPrediction(shift=prediction.shift, multiplier=1.0, timesteps=TABLE_LENGTH),
    native_size_px=lambda prediction: 1024,
    build_text_engines=build_text_engines,
    encode=encode,
    join_checkpoint=join_chroma,
    compute_dtypes=FLUX.compute_dtypes,
    attends_jointly=True,
    build_token_counter=build_token_counter,
    forge_shifts_table_alone=True,
    default_schedule="simple",
    defaults=PageDefaults(preset="chroma", sampler="Euler", schedule="Beta", steps=26, cfg=3.5, width_px=1024, height_px=1024),
    denoiser_title="transformer",
)
