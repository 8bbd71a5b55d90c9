"""What extensions ask of torch, under the names that they import."""

from __future__ import annotations

import torch


def get_param(model: torch.nn.Module) -> torch.nn.Parameter:
    """Any parameter of `model`, to read its device and type from. Raises StopIteration for a model without any."""
    inner = getattr(model, "model", None)
    return next((inner if isinstance(inner, torch.nn.Module) and hasattr(inner, "parameters") else model).parameters())


def float64(t: torch.Tensor) -> torch.dtype:
    """The widest floating type that the device of `t` computes in."""
    return torch.float32 if t.device.type in ("mps", "xpu") else torch.float64
