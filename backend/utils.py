"""Helpers under the names that extensions import from Forge's engine."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from backend.state_dict import read_state_dict


def load_torch_file(ckpt: str, safe_load: bool = False, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """All tensors of a file on `device` (default: the host). Pickled files are always read by the restricted unpickler.

    Raises: CheckpointError for a file that cannot be read.
    """
    tensors = read_state_dict(Path(ckpt))
    return tensors if device is None else {name: tensor.to(device) for name, tensor in tensors.items()}
