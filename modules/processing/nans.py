"""Explains why a job gave NaN, from the request: a LoRA, a ControlNet, a prompt weight, a guidance scale, or values in the model file.

Called only after a network returned nothing but NaN. Takes the request (`p`); computes no pictures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modules import devices
from modules.errors import RequestError
from modules.prompts import schedules as prompt_parser

if TYPE_CHECKING:
    from modules.processing.request import StableDiffusionProcessing

_HUGE = 1e4
"""Strengths, weights and scales above this ruin every picture; usual values are below 10."""


class NanCauseError(RequestError):
    """NaN caused by the request itself."""


@contextmanager
def explaining_nans(p: StableDiffusionProcessing) -> Iterator[None]:
    """Raises NanCauseError instead of NansException if the request or its files explain the NaN."""
    try:
        yield
    except devices.NansException as error:
        causes = [*_causes_in_loras(p), *_causes_in_controls(p), *_causes_in_numbers(p)] or [*_causes_in_files(p)]
        if not causes:
            raise
        raise NanCauseError(f"The whole picture became NaN. {' '.join(causes)}") from error


def _causes_in_loras(p: StableDiffusionProcessing) -> Iterator[str]:
    named = set()
    for patcher in (p.sd_model.forge_objects.unet, p.sd_model.forge_objects.clip.patcher):
        for (filename, strength, *_), steps in patcher.lora_patches.items():
            name = Path(str(filename)).stem
            if name in named:
                continue
            cause = _cause_in_lora(name, float(strength), [step.patch for chain in steps.values() for step in chain])
            if cause:
                named.add(name)
                yield cause


def _cause_in_lora(name: str, strength: float, patches: list[Any]) -> str | None:
    if not abs(strength) <= _HUGE:
        return f"The LoRA {name} has strength {strength:g}; use a value near 1."
    for patch in patches:
        tensors = list(_tensors_in(patch))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return f"The LoRA {name} contains NaN or infinite values: the file is broken. Download it again or remove it from the prompt."
        if math.prod(max(1.0, float(tensor.abs().max())) for tensor in tensors if tensor.numel()) * abs(strength) > _HUGE**2:
            return f"The LoRA {name} contains values far too large for a model. Remove it from the prompt."
    return None


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """All float tensors in a patch, which is a dataclass or a nested tuple."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and not value.is_meta:
            yield value.float()
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors_in(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors_in(one)


def _causes_in_controls(p: StableDiffusionProcessing) -> Iterator[str]:
    """Checks the chain of controls that extensions attach to the denoiser."""
    for link in p.sd_model.forge_objects.unet.list_controlnets():
        strength = float(getattr(link, "strength", 1.0))
        if not abs(strength) <= _HUGE:
            yield f"A ControlNet has weight {strength:g}; use a value between 0 and 2."
        model = getattr(link, "control_model", None)
        if isinstance(model, torch.nn.Module) and (name := _first_broken(model)):
            yield f"A ControlNet's file contains NaN or infinite values (first in {name}); download it again."


def _causes_in_numbers(p: StableDiffusionProcessing) -> Iterator[str]:
    for name in ("cfg_scale", "hr_cfg", "initial_noise_multiplier", "s_noise", "eta", "s_churn"):
        value = getattr(p, name, None)
        if isinstance(value, (int, float)) and abs(value) > _HUGE:
            yield f"{name} is {value:g}; use a smaller value."
    weights = (abs(weight) for text in (*p.prompts, *p.negative_prompts) for _, weight in prompt_parser.parse_prompt_attention(text))
    largest = max(weights, default=1.0)
    if not largest <= _HUGE:
        yield f"A part of the prompt has the weight {largest:g}; use a value near 1."


def _causes_in_files(p: StableDiffusionProcessing) -> Iterator[str]:
    objects = p.sd_model.forge_objects
    parts = (("UNet", objects.unet.model), ("text encoder", objects.clip.patcher.model), ("VAE", objects.vae.first_stage_model))
    for part, network in parts:
        if name := _first_broken(network):
            yield f"The {part} of {p.sd_model_name} contains NaN or infinite values (first in {name}): the file is broken; download it again."


def _first_broken(network: torch.nn.Module) -> str | None:
    """Name of the first weight with a value that is not finite."""
    for name, weight in network.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and not bool(torch.isfinite(weight.float()).all()):
            return name
    return None
