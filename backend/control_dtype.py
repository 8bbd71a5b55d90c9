"""The dtype of the networks that guide a denoiser (ControlNets, adapters). Must not know files or chains."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backend import memory_management

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRANSFORMER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def pick_dtype(model: torch.nn.Module, dtypes: Sequence[torch.dtype] = _DTYPES) -> torch.dtype:
    """The dtype to store and compute the network in: the one a denoiser of its size is computed in on the current device. `dtypes`: best first."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return memory_management.get_computation_dtype(memory_management.get_torch_device(), parameters, tuple(dtypes))
