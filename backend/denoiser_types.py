"""Choose the dtypes that weights are stored and computed in: the requested one, else the file's, else the device's default.

The loader and the plan shown before loading both use it, so that they count the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from backend import memory_management
from backend.storage.kinds import is_compact


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkTypes:
    """`storage_dtype`: of linear, convolution and embedding layers. `computation_dtype`: of everything else, and the dtype layers compute in."""

    storage_dtype: torch.dtype
    computation_dtype: torch.dtype


PACKED = torch.uint8
"""The dtype of packed weights in lists of dtypes."""
HALF_AND_FULL = (torch.float16, torch.bfloat16, torch.float32)


def choose_denoiser_types(
    stored: Iterable[torch.dtype],
    num_parameters: int,
    *,
    wanted: torch.dtype | None = None,
    supported: Sequence[torch.dtype] = HALF_AND_FULL,
) -> NetworkTypes:
    """`stored`: the dtypes of the file's matrices. `wanted` (an option or a flag) takes precedence over the file, the file over the device's default.

    `supported`: dtypes the network may compute in, best first. Packed weights stay as they are; what a file packs mostly has its other weights in
    the computation dtype. When the device's default decides, a weight that would be cast from one half type to
    another at every use is stored in the computation dtype instead.
    """
    device, types = memory_management.get_torch_device(), list(stored)
    computation_dtype = memory_management.get_computation_dtype(device, num_parameters, supported)
    if PACKED in types:
        return NetworkTypes(storage_dtype=computation_dtype, computation_dtype=computation_dtype)
    storage_dtype = wanted or _worth_keeping(types, device) or memory_management.unet_dtype(device, num_parameters, supported)
    if wanted is None and storage_dtype != computation_dtype and storage_dtype.itemsize == computation_dtype.itemsize:
        storage_dtype = computation_dtype
    return NetworkTypes(storage_dtype=storage_dtype, computation_dtype=computation_dtype)


def _worth_keeping(stored: list[torch.dtype], device: torch.device) -> torch.dtype | None:
    """The compact dtype that most of the file's weights have, if the device benefits from keeping it."""
    if not stored:
        return None
    most = max(set(stored), key=stored.count)
    return most if is_compact(most) and device.type != "cpu" and memory_management.supports_cast(device, most) else None


LARGE_PARAMETERS = 10**9
"""Text encoders above this (T5, language models) keep their file's dtype if it is narrower: they stay in host memory between prompts."""


def choose_text_encoder_types(
    stored: Iterable[torch.dtype], num_parameters: int, device: torch.device, *, wanted: torch.dtype | None = None
) -> NetworkTypes:
    """Types of a text encoder on `device`. `wanted` (a flag) beats the device's default; a large one keeps its file's dtype if that is narrower."""
    types = [dtype for dtype in stored if dtype != PACKED]
    storage_dtype = wanted or memory_management.text_encoder_dtype(device)
    if wanted is None and num_parameters > LARGE_PARAMETERS and types:
        storage_dtype = memory_management.pick_weight_dtype(max(set(types), key=types.count), storage_dtype, device)
    computes_directly = not is_compact(storage_dtype) and memory_management.supports_dtype(device, storage_dtype)
    return NetworkTypes(
        storage_dtype=storage_dtype,
        computation_dtype=storage_dtype if computes_directly else memory_management.get_computation_dtype(device),
    )
