"""CLIP's picture tower from a file, for IP-Adapters: transformers' network, and the preparation of a picture.

Must not know adapters, units or folders. Shapes: N pictures, L tokens (one per patch, plus one), D token width, P projection width.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from backend import memory_management
from backend.checkpoint_config import head_count
from backend.checkpoint_file import CheckpointError, TensorFile, open_tensor_file
from backend.control_dtype import pick_dtype
from backend.patcher.base import ModelPatcher
from backend.state_dict import assign_tensors, build_empty, check_plan, plan_as_named
from backend.tensor_file import refusing_odd_shapes

logger = logging.getLogger(__name__)

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HEADS = {768: 12, 1024: 16, 1280: 16, 1664: 16}
"""Number of heads by width, for the published towers B, L, H and bigG."""
_QUICK_GELU_WIDTHS = ((768, 512), (1024, 768))
"""(width, projected width) of OpenAI's towers; OpenCLIP's use the exact GELU."""
_HEAD = "vision_model."


def is_clip_vision(keys: Collection[str]) -> bool:
    """Whether these are tensor names of a picture tower in transformers' layout."""
    return f"{_HEAD}embeddings.patch_embedding.weight" in keys


def tower_widths(file: TensorFile) -> tuple[int, int]:
    """(token width, projection width) of the picture tower in a file."""
    projection = file.infos.get("visual_projection.weight")
    return file.infos[f"{_HEAD}embeddings.patch_embedding.weight"].shape[0], 0 if projection is None else projection.shape[0]


class ClipVision:
    """A picture tower with its patcher for memory management."""

    def __init__(self, model: CLIPVisionModelWithProjection, path: Path) -> None:
        self.path = path
        self.patcher = ModelPatcher(
            model, load_device=memory_management.get_torch_device(), offload_device=torch.device("cpu"), current_device=torch.device("cpu")
        )

    def encode_images(self, pictures: Sequence[np.ndarray], *, hidden_states: bool) -> Tensor:
        """Encode an empty picture and I pictures (H, W, 3), uint8, in this order: last layer's input (1 + I, L, D), or projection (1 + I, P)."""
        memory_management.load_models_gpu([self.patcher])
        model: Any = self.patcher.model
        device, dtype = self.patcher.load_device, next(model.parameters()).dtype
        pixels = torch.cat([prepare_picture(picture, int(model.config.image_size)) for picture in pictures]).to(device, dtype)
        with torch.inference_mode():
            if hidden_states:
                both = model(torch.cat([torch.zeros_like(pixels[:1]), pixels]), output_hidden_states=True)
                found: Tensor = both.hidden_states[-2]
                return found
            embeds: Tensor = model(pixels).image_embeds
            return torch.cat([torch.zeros_like(embeds[:1]), embeds])

    def encode_image(self, image: Tensor) -> ClipVisionOutput:
        """Encode pictures (N, H, W, 3), 0..1, under Forge's names."""
        pictures = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        memory_management.load_models_gpu([self.patcher])
        model: Any = self.patcher.model
        device, dtype = self.patcher.load_device, next(model.parameters()).dtype
        pixels = torch.cat([prepare_picture(picture, int(model.config.image_size)) for picture in pictures]).to(device, dtype)
        with torch.inference_mode():
            found = model(pixels, output_hidden_states=True)
        return ClipVisionOutput(
            last_hidden_state=found.last_hidden_state, penultimate_hidden_states=found.hidden_states[-2], image_embeds=found.image_embeds
        )


class ClipVisionOutput(dict[str, Tensor]):
    """`last_hidden_state` (N, L, D), `penultimate_hidden_states` (N, L, D) and `image_embeds` (N, P), as keys and as attributes."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"a picture's encoding has {', '.join(self)}, and no {name}") from error


def prepare_picture(picture: np.ndarray, side_px: int) -> Tensor:
    """The middle square as (1, 3, side, side), normalized as in CLIP's training."""
    image = Image.fromarray(picture).convert("RGB")
    scale = side_px / min(image.size)
    width, height = (side_px if side == min(image.size) else int(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side_px) // 2, (height - side_px) // 2
    values = np.asarray(image.crop((left, top, left + side_px, top + side_px)), dtype=np.float32) / 255.0
    normal = (values - np.array(_MEAN, dtype=np.float32)) / np.array(_STD, dtype=np.float32)
    return torch.from_numpy(normal.transpose(2, 0, 1)[None].copy())


def load_clip_vision(path: Path) -> ClipVision:
    """The picture tower in a file. Raises: CheckpointError for a damaged file or another kind of file."""
    with open_tensor_file(path) as file:
        if not is_clip_vision(file.infos):
            raise CheckpointError(f"{path.name}: is not a CLIP vision model in transformers' layout (no {_HEAD}embeddings.*). Choose another file.")
        with refusing_odd_shapes(file):
            config = _read_config(file)
            model = build_empty(lambda: CLIPVisionModelWithProjection(config))
            plan = plan_as_named(model, file, _stored_name)
            check_plan(plan, file, "CLIP vision model")
        assign_tensors(model, plan, file, storage_dtype=pick_dtype(model))
    logger.info("Loaded %s: a CLIP vision model of width %d.", path.name, config.hidden_size)
    return ClipVision(model, path)


def _count_layers(keys: Collection[str]) -> int:
    """Consecutive layers, from 0. Numbers behind a gap build none: a file with a layer of number 10**9 would take all memory."""
    start = f"{_HEAD}encoder.layers."
    numbers = {key.removeprefix(start).partition(".")[0] for key in keys if key.startswith(start)}
    return next(count for count in itertools.count() if str(count) not in numbers)


def _stored_name(key: str) -> str:
    return key if key.startswith((_HEAD, "visual_projection.")) else _HEAD + key


def _read_config(file: TensorFile) -> CLIPVisionConfig:
    shapes = {key: info.shape for key, info in file.infos.items()}
    needed = [f"{_HEAD}embeddings.position_embedding.weight", f"{_HEAD}encoder.layers.0.mlp.fc1.weight", "visual_projection.weight"]
    missing = next((key for key in needed if key not in shapes), None)
    if missing is not None:
        raise CheckpointError(f"{file.path.name}: its CLIP vision model lacks {missing}. Choose a file with the projection, or download it again.")
    width, _, patch_px, _ = shapes[f"{_HEAD}embeddings.patch_embedding.weight"]
    projected = shapes["visual_projection.weight"][0]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes[f"{_HEAD}encoder.layers.0.mlp.fc1.weight"][0],
        projection_dim=projected,
        num_hidden_layers=_count_layers(shapes),
        num_attention_heads=_HEADS.get(width, head_count(width)),
        image_size=round((shapes[f"{_HEAD}embeddings.position_embedding.weight"][0] - 1) ** 0.5) * patch_px,
        patch_size=patch_px,
        hidden_act="quick_gelu" if (width, projected) in _QUICK_GELU_WIDTHS else "gelu",
    )
