"""What --pytorch-deterministic enables in torch. The launcher sets the variable that cuBLAS reads, before torch is imported."""

from __future__ import annotations

import torch

from backend.args import BackendConfig


def apply_determinism(config: BackendConfig) -> None:
    """Make torch use algorithms that give the same bits every time. An operation without one warns and runs anyway."""
    if config.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
