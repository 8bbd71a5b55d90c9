"""What --pytorch-deterministic switches on in torch. The variable that cuBLAS reads is set before torch is imported, by the launcher."""

from __future__ import annotations

import torch

from backend.args import BackendConfig


def apply_determinism(config: BackendConfig) -> None:
    """Have torch use algorithms that give the same bits every time; an operation that has none warns and runs."""
    if config.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
