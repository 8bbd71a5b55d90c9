"""What the networks that guide a denoiser are stored and computed in. Must not know files or chains."""

from __future__ import annotations

import torch

from backend import memory_management

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def pick_dtype(model: torch.nn.Module) -> torch.dtype:
    """What the network is stored and computed in: what a UNet of its size is computed in on the device in use."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return memory_management.get_computation_dtype(memory_management.get_torch_device(), parameters, _DTYPES)
