"""SigLIP's picture tower from a file, for Redux: transformers' network, and the preparation of a picture.

Must not know adapters, units or folders. Shapes: N pictures, L tokens (one per patch), D token width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from backend import memory_management
from backend.checkpoint_config import head_count
from backend.checkpoint_file import CheckpointError, TensorFile, open_tensor_file
from backend.checkpoint_layout import Layout, Part
from backend.control_dtype import pick_dtype
from backend.families.file_shapes import FileShapes, read_part
from backend.patcher.base import ModelPatcher
from backend.state_dict import assign_tensors, build_empty, check_plan, plan_as_named
from backend.tensor_file import refusing_odd_shapes

logger = logging.getLogger(__name__)

TITLE = "a SigLIP vision model"
_HEAD = "vision_model."
_MARKS = (f"{_HEAD}embeddings.patch_embedding.bias", f"{_HEAD}post_layernorm.weight")
_HEADS = {768: 12, 1024: 16, 1152: 16}
"""Number of heads by width, for the published towers B, L and SO400M."""
_SIDES_PX = {(14, 27): 384}
"""Side of the pictures by (patch, patches per side), where patches do not divide it."""


def is_siglip_vision(keys: Collection[str]) -> bool:
    """Whether these are tensor names of SigLIP's picture tower in transformers' layout. CLIP's has no bias at its patches."""
    return all(mark in keys for mark in _MARKS)


def siglip_width(file: TensorFile) -> int:
    """The token width of the tower in a file."""
    return file.infos[_MARKS[0]].shape[0]


class SiglipVision:
    """A picture tower with its patcher for memory management."""

    def __init__(self, model: SiglipVisionModel, path: Path) -> None:
        self.path = path
        self.patcher = ModelPatcher(
            model, load_device=memory_management.get_torch_device(), offload_device=torch.device("cpu"), current_device=torch.device("cpu")
        )

    def encode_images(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """The last layer's tokens (N, L, D) of pictures (height, width, 3), uint8, after its norm."""
        memory_management.load_models_gpu([self.patcher])
        model: Any = self.patcher.model
        device, dtype = self.patcher.load_device, next(model.parameters()).dtype
        pixels = torch.cat([prepare_picture(picture, int(model.config.image_size)) for picture in pictures]).to(device, dtype)
        with torch.inference_mode():
            tokens_NLD: Tensor = model(pixels).last_hidden_state
        return tokens_NLD


def prepare_picture(picture: np.ndarray, side_px: int) -> Tensor:
    """The whole picture as a square, (1, 3, side, side) in -1..1, as in SigLIP's training."""
    image = Image.fromarray(picture).convert("RGB").resize((side_px, side_px), Image.Resampling.BICUBIC)
    values = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(values.transpose(2, 0, 1)[None].copy())


def load_siglip_vision(path: Path) -> SiglipVision:
    """The picture tower in a file. Raises: CheckpointError for a damaged file or another kind of file."""
    with open_tensor_file(path) as file:
        if not is_siglip_vision(file.infos):
            raise CheckpointError(f"{path.name}: is not {TITLE} in transformers' layout (no {_MARKS[0]}). Choose another file.")
        with refusing_odd_shapes(file):
            config = _read_config(read_part(file, Part(_HEAD, Layout.TRANSFORMERS), TITLE))
            model = build_empty(lambda: SiglipVisionModel(config))
            plan = plan_as_named(model, file, lambda key: _HEAD + key.removeprefix(_HEAD))
            check_plan(plan, file, "SigLIP vision model")
        assign_tensors(model, plan, file, storage_dtype=pick_dtype(model))
    logger.info("Loaded %s: %s of width %d.", path.name, TITLE, config.hidden_size)
    return SiglipVision(model, path)


def _read_config(shapes: FileShapes) -> SiglipVisionConfig:
    width, _, patch_px, _ = shapes.find("embeddings.patch_embedding.weight", 4)
    num_places, _ = shapes.find("embeddings.position_embedding.weight")
    side = math.isqrt(num_places)
    if side * side != num_places:
        raise shapes.refuse(f"{num_places} positions")
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=shapes.find("encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=shapes.count_blocks("encoder.layers."),
        num_attention_heads=_HEADS.get(width, head_count(width)),
        image_size=_SIDES_PX.get((patch_px, side), side * patch_px),
        patch_size=patch_px,
        vision_use_head=False,
    )
