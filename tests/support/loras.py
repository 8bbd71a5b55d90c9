"""LoRA files for the narrow checkpoints of tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.checkpoints import ReferenceModels


def write_lora(
    path: Path, models: ReferenceModels, *, te: bool = True, unet: bool = True, scale: float = 0.3, metadata: Mapping[str, str] | None = None
) -> None:
    """A LoRA in kohya's naming over all linear layers."""
    generator = torch.Generator().manual_seed(len(path.stem))
    tensors: dict[str, Tensor] = {}
    parts = [("lora_unet_", models.unet, unet), ("lora_te_text_model_", models.text_encoders[0], te)]
    for prefix, model, wanted in parts:
        for name, weight in model.named_parameters() if wanted else ():
            if name.endswith(".weight") and weight.ndim == 2 and "embedding" not in name:
                layer = prefix + name.removesuffix(".weight").replace(".", "_")
                tensors[f"{layer}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator) * scale
                tensors[f"{layer}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator) * scale
                tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"ss_base_model_version": "sd_v1", **(metadata or {})})
