"""Forge's names for LoRA: state dicts, layer names, and formulas. The implementation is in the `lora_*` modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from backend.patcher.lora_files import load_lora
from backend.patcher.lora_keys import model_lora_keys_clip, model_lora_keys_unet
from backend.patcher.lora_math import as_weight_patch, decompose_weight, extra_weight_calculators
from backend.patcher.weight_patches import LoraLoader, Step, merge_recipe

__all__ = [
    "LoraLoader",
    "extra_weight_calculators",
    "load_lora",
    "merge_lora_to_weight",
    "model_lora_keys_clip",
    "model_lora_keys_unet",
    "weight_decompose",
]


def merge_lora_to_weight(patches: Iterable[Any], weight: Tensor, key: str = "online_lora", computation_dtype: torch.dtype = torch.float32) -> Tensor:
    """`weight` after patches [strength_patch, value, strength_model, offset, function], in its own dtype."""
    steps = [Step(strength, as_weight_patch(value), model, offset, function) for strength, value, model, offset, function in patches]
    return merge_recipe(weight.to(torch.float32, copy=True), steps).to(weight.dtype)


def weight_decompose(
    dora_scale: Tensor, weight: Tensor, lora_diff: Tensor, alpha: float, strength: float, computation_dtype: torch.dtype, function: Any = None
) -> Tensor:
    """DoRA of a weight and its LoRA difference times `alpha`."""
    difference = lora_diff.to(weight.device, computation_dtype) * alpha
    added = difference if function is None else function(difference)
    return decompose_weight(dora_scale.to(weight.device, computation_dtype), weight, added, strength)
