"""Which types weights are stored and computed in: what was asked for, else what the file has, else the device's rule.

The loader builds by it, and the plan that is shown before loading counts by it, so that both see the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from backend import memory_management
from backend.storage.kinds import is_compact


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkTypes:
    """`storage_dtype` of linear, convolution and embedding layers; `computation_dtype` of everything else, and of what layers compute in."""

    storage_dtype: torch.dtype
    computation_dtype: torch.dtype


HALF_AND_FULL = (torch.float16, torch.bfloat16, torch.float32)


def choose_denoiser_types(
    stored: Iterable[torch.dtype],
    num_parameters: int,
    *,
    wanted: torch.dtype | None = None,
    supported: Sequence[torch.dtype] = HALF_AND_FULL,
) -> NetworkTypes:
    """`stored`: the types of the file's matrices. `wanted` (an option or a flag) goes before the file, the file before the device's rule.

    `supported`: what the network may compute in, best first. Where the device's rule decides, a weight that would be cast from one half type to
    another at every use is stored in the type that is computed in.
    """
    device = memory_management.get_torch_device()
    computation_dtype = memory_management.get_computation_dtype(device, num_parameters, supported)
    storage_dtype = wanted or _worth_keeping(list(stored), device) or memory_management.unet_dtype(device, num_parameters, supported)
    if wanted is None and storage_dtype != computation_dtype and storage_dtype.itemsize == computation_dtype.itemsize:
        storage_dtype = computation_dtype
    return NetworkTypes(storage_dtype=storage_dtype, computation_dtype=computation_dtype)


def _worth_keeping(stored: list[torch.dtype], device: torch.device) -> torch.dtype | None:
    """The compact type that most of the file's weights are in already, on a device that gains by keeping them so."""
    if not stored:
        return None
    most = max(set(stored), key=stored.count)
    return most if is_compact(most) and device.type != "cpu" and memory_management.supports_cast(device, most) else None


LARGE_PARAMETERS = 10**9
"""Text encoders above this (T5, language models) are not made wider than their file has them: they rest in the host's memory between prompts."""


def choose_text_encoder_types(
    stored: Iterable[torch.dtype], num_parameters: int, device: torch.device, *, wanted: torch.dtype | None = None
) -> NetworkTypes:
    """Of one text encoder that works on `device`. `wanted` (a flag) goes before the device's rule; a large one keeps a narrower type of its file."""
    types = list(stored)
    storage_dtype = wanted or memory_management.text_encoder_dtype(device)
    if wanted is None and num_parameters > LARGE_PARAMETERS and types:
        storage_dtype = memory_management.pick_weight_dtype(max(set(types), key=types.count), storage_dtype, device)
    computes_directly = not is_compact(storage_dtype) and memory_management.supports_dtype(device, storage_dtype)
    return NetworkTypes(
        storage_dtype=storage_dtype,
        computation_dtype=storage_dtype if computes_directly else memory_management.get_computation_dtype(device),
    )
