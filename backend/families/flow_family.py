"""What families of rectified-flow transformers share: a network built without memory, one shift of noise levels, and single files in the original
layout. A family's `__init__` gives these its own network, numbers and names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from backend.checkpoint_file import TensorFile
from backend.checkpoint_prediction import FLOW, PredictionSpec
from backend.families.family import FoundDenoiser
from backend.families.key_map import KeyMap
from backend.families.single_file import VAE_PREFIX, join_parts
from backend.key_layout import UNET_PREFIX, vae_to_ldm
from backend.modules.k_prediction import FlowPrediction
from backend.state_dict import build_empty

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""fp16 is safe for all of them: their streams are fp32 then."""


def build_with(network: Callable[..., Any]) -> Callable[[FoundDenoiser], nn.Module]:
    """A family's `build_denoiser`, from a class that takes the found configuration."""
    return lambda found: build_empty(lambda: cast("nn.Module", network(**found.config)))


def predict_flow(shift: float) -> Callable[[TensorFile, FoundDenoiser, nn.Module], PredictionSpec]:
    """A family's `find_prediction` if every file of it has this shift."""
    return lambda file, found, network: PredictionSpec(kind=FLOW, shift=shift, source="the family's rule")


def flow_predictor(*, multiplier: float = 1.0, timesteps: int = 1000, time_is_clean: bool = False) -> Callable[[PredictionSpec], FlowPrediction]:
    """A family's `make_predictor`."""
    return lambda prediction: FlowPrediction(
        shift=prediction.shift, multiplier=multiplier, timesteps=timesteps, time_is_clean=time_is_clean
    )  # fmt: skip


def join_original(
    denoiser: nn.Module, key_map: Callable[[nn.Module], KeyMap], vae: nn.Module, texts: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """An all-in-one file's tensors in the original layout. `texts`: text encoders by their prefixes."""
    config = cast("dict[str, object]", vae.config)
    return join_parts(
        {UNET_PREFIX: key_map(denoiser).to_original(denoiser.state_dict()), VAE_PREFIX: vae_to_ldm(vae.state_dict(), config), **texts}
    )  # fmt: skip
