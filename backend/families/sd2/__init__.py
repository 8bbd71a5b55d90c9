"""Stable Diffusion 2.x, noise or velocity prediction. Its OpenCLIP H is read before the last block, so clip skip 1 is the published setting.

Everything else is that of `unet_family`. Example: a file whose UNet takes text of 1024 numbers per token and no vector is this family's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from backend.checkpoint_file import TensorFile
from backend.checkpoint_prediction import EPSILON, V_PREDICTION, PredictionSpec, predicts_velocity, read_prediction
from backend.families.family import Family, FoundDenoiser, PageDefaults
from backend.families.latent_format import LatentFormat
from backend.families.unet_family import (
    build_unet,
    build_unet_program,
    clip_h,
    encode_text_alone,
    find_unet_prediction,
    identify_unet,
    is_the_only_one,
    join_unet_checkpoint,
    kl_vae,
    make_discrete_predictor,
    unet_key_map,
)
from backend.key_layout import OPEN_CLIP_PREFIX, append_unused_block, clip_to_open_clip
from backend.text_processing.classic_engine import ClassicTextProcessingEngine

LATENT = LatentFormat(channels=4, factor=8, scale=0.18215)
USED_BLOCKS = 23


def find_prediction(file: TensorFile, found: FoundDenoiser, unet: nn.Module) -> PredictionSpec:
    """Files from 2022 have no marker key, so the UNet is run once to find out. The inpainting model predicts noise."""
    if found.is_inpaint or read_prediction(file, prefix=found.part.prefix) is not None:
        return find_unet_prediction(file, found, unet)
    return PredictionSpec(kind=V_PREDICTION if predicts_velocity(unet) else EPSILON, source="found by a test run of the UNet")


def _write_text(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Files hold one block more than is used."""
    return append_unused_block(clip_to_open_clip(state_dict))


FAMILY = Family(
    name="sd20",
    title="SD 2.x",
    line="SD 2.x",
    rank=30,
    identify=partial(identify_unet, name="sd20"),
    build_denoiser=build_unet,
    key_map=unet_key_map,
    build_program=build_unet_program,
    text_encoders=(clip_h(is_the_only_one, USED_BLOCKS),),
    vae=kl_vae(LATENT, "SD 2.x"),
    latent=LATENT,
    find_prediction=find_prediction,
    make_predictor=make_discrete_predictor,
    native_size_px=lambda prediction: 768 if prediction.kind == V_PREDICTION else 512,  # the model that predicts v is the 768 one
    build_text_engines=lambda encoders, tokenizers, embeddings: [
        ClassicTextProcessingEngine(encoders["clip_h"], tokenizers["clip_h"], embedding_key="clip_h", embeddings=embeddings)
    ],
    encode=encode_text_alone,
    join_checkpoint=partial(join_unet_checkpoint, ((OPEN_CLIP_PREFIX, _write_text),)),
    defaults=PageDefaults(preset="sd", width_px=768, height_px=768),
    forge_flags=frozenset({"is_sd2"}),
)
