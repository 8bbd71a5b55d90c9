"""Chroma: Chroma1-HD, Chroma1-Base and their fine-tunes. Flux.1's parts with true CFG: one modulation net for all blocks, T5-XXL alone.

Reading order: `identify` (which files), `key_map` (names), `program` (the network in segments), `text` (prompts), and here what they make.

Example: a file has Flux.1's blocks and `distilled_guidance_layer.*`, so it is Chroma. That layer runs once per call, and every block reads its
modulations from what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from backend.families.chroma.identify import TITLE, identify_chroma
from backend.families.chroma.key_map import chroma_key_map
from backend.families.chroma.program import build_chroma_program
from backend.families.chroma.text import TEXT_ENCODERS, build_text_engines, build_token_counter, encode
from backend.families.family import Family, PageDefaults
from backend.families.flow_family import COMPUTE_DTYPES, build_with, flow_predictor, join_original, predict_flow
from backend.families.flux import LATENT, TABLE_LENGTH
from backend.families.single_file import t5_to_file
from backend.families.unet_family import kl_vae
from backend.modules.k_prediction import shift_from_mu
from backend.nn.chroma import IntegratedChromaTransformer2DModel

MU = 1.0
"""Forge's. The authors' own pipeline shifts by 1, that is not at all."""


def join_chroma(denoiser: nn.Module, vae: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, Tensor]:
    """An all-in-one file's tensors: the transformer in the original layout, VAE and T5 under the names that other UIs read."""
    (t5,) = encoders
    return join_original(denoiser, chroma_key_map, vae, {"text_encoders.t5xxl.transformer.": t5_to_file(t5.state_dict())})


FAMILY = Family(
    name="chroma",
    title=TITLE,
    line=TITLE,
    rank=39,
    identify=identify_chroma,
    build_denoiser=build_with(IntegratedChromaTransformer2DModel),
    key_map=chroma_key_map,
    build_program=build_chroma_program,
    text_encoders=TEXT_ENCODERS,
    vae=replace(kl_vae(LATENT, TITLE), usual_file="ae.safetensors (0.34 GB)"),
    latent=LATENT,
    find_prediction=predict_flow(shift_from_mu(MU)),
    make_predictor=flow_predictor(timesteps=TABLE_LENGTH),
    native_size_px=lambda prediction: 1024,
    build_text_engines=build_text_engines,
    encode=encode,
    join_checkpoint=join_chroma,
    compute_dtypes=COMPUTE_DTYPES,
    attends_jointly=True,
    build_token_counter=build_token_counter,
    forge_shifts_table_alone=True,
    default_schedule="simple",
    defaults=PageDefaults(preset="chroma", sampler="Euler", schedule="Beta", steps=26, cfg=3.5, width_px=1024, height_px=1024),
    denoiser_title="transformer",
)
