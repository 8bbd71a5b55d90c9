"""The picture tower of Qwen2.5-VL: transformers' layers, and the preparation of a picture. Safe in half precision: the stream is fp32 there.

Most blocks attend within windows of 112 pixels, every eighth to the whole picture. Four patches become one token of the language model.

Shapes: P patches, L tokens (P / 4), D width of the tower, K head width, H W rows and columns of patches.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed, Qwen2_5_VLPatchMerger, Qwen2_5_VLVisionBlock

from backend.nn.stream_layers import Rope, gated, half_frequencies, half_tables

HEADS = 16
FULL_EVERY = 8
MERGE, WINDOW_CELLS = 2, 4
"""Patches per side of a token, and tokens per side of a window."""
THETA = 10_000.0
"""All of every published Qwen2.5-VL; no shape tells them."""
RECIPE_STEP_PX = 32
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class PreparedPicture(NamedTuple):
    """`patches` (P, numbers of a patch) fp32, those of a token one after the other; `rows` and `columns` of patches, both even."""

    patches: Tensor
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        return self.rows * self.columns // MERGE**2


class VisionTower(nn.Module):
    """Patches of one picture in, tokens (L, width of the language model) out. Names are those of transformers' tower."""

    def __init__(self, config: Qwen2_5_VLVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = Qwen2_5_VisionPatchEmbed(config.patch_size, config.temporal_patch_size, config.in_channels, config.hidden_size)
        self.blocks = nn.ModuleList([Qwen2_5_VLVisionBlock(config) for _ in range(config.depth)])
        self.merger = Qwen2_5_VLPatchMerger(config.out_hidden_size, config.hidden_size, MERGE)

    def forward(self, picture: PreparedPicture) -> Tensor:
        projection = self.patch_embed.proj
        dtype, device = self.merger.ln_q.weight.dtype, projection.weight.device  # a norm's, as weights may be stored in another
        order_L, window_ends = window_order(picture.rows // MERGE, picture.columns // MERGE)
        pixels = picture.patches.view(-1, self.config.in_channels, *projection.kernel_size)
        embedded_PD: Tensor = projection(pixels.to(device, dtype)).flatten(1)
        stream_PD = embedded_PD.float() if dtype in (torch.float16, torch.bfloat16) else embedded_PD
        num_patches, order_L = len(stream_PD), order_L.to(device)
        stream_PD = stream_PD.view(-1, MERGE**2, stream_PD.shape[1])[order_L].view(num_patches, -1)
        rope = self._rope(picture, order_L)
        windows, whole = torch.tensor([0, *(end * MERGE**2 for end in window_ends)]), torch.tensor([0, num_patches])
        for number, block in enumerate(self.blocks):
            stream_PD = _run_block(block, stream_PD, whole if number % FULL_EVERY == FULL_EVERY - 1 else windows, rope, dtype)
        merged_LD: Tensor = self.merger.mlp(self.merger.ln_q(stream_PD).to(dtype).view(len(order_L), -1))
        return merged_LD[torch.argsort(order_L)]

    def _rope(self, picture: PreparedPicture, order_L: Tensor) -> Rope:
        """Cosines and sines (P, K) fp32: half of a head's angles for the row, half for the column."""
        head_width = self.config.hidden_size // HEADS
        omega = half_frequencies(head_width // 2, THETA, order_L.device)
        places_P2 = patch_places(picture.rows, picture.columns).to(order_L.device).view(-1, MERGE**2, 2)[order_L].view(-1, 2)
        return half_tables((places_P2[..., None] * omega).flatten(1), torch.float32)


def _run_block(block: Any, stream_PD: Tensor, ends: Tensor, rope: Rope, dtype: torch.dtype) -> Tensor:
    """The stream after a block; attention runs between each two of `ends`."""
    mixed_PD = block.attn(block.norm1(stream_PD).to(dtype), cu_seqlens=ends, position_embeddings=rope)
    stream_PD = stream_PD + mixed_PD.to(stream_PD.dtype)
    inner_PD = gated(block.mlp.up_proj, block.mlp.gate_proj, block.mlp.down_proj, block.norm2(stream_PD).to(dtype))
    return stream_PD + inner_PD.to(stream_PD.dtype)


def window_order(rows: int, columns: int) -> tuple[Tensor, list[int]]:
    """The tokens of a picture of rows x columns tokens, window by window, (L,), and where each window ends."""
    places = sorted((row // WINDOW_CELLS, column // WINDOW_CELLS, row * columns + column) for row in range(rows) for column in range(columns))
    ends = [index for index in range(1, len(places)) if places[index][:2] != places[index - 1][:2]]
    return torch.tensor([number for _, _, number in places]), [*ends, len(places)]


def patch_places(rows: int, columns: int) -> Tensor:
    """Row and column (P, 2) of the patches, in the order of PreparedPicture."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
    return _by_token(grid).float()


def _by_token(grid_HWN: Tensor) -> Tensor:
    """Patches (H, W, N) in the order of tokens, (P, N)."""
    rows, columns, numbers = grid_HWN.shape
    cells = grid_HWN.view(rows // MERGE, MERGE, columns // MERGE, MERGE, numbers)
    return cells.permute(0, 2, 1, 3, 4).reshape(-1, numbers)


# preparation


def prepare_picture(picture_HWC: np.ndarray, area_px: int, config: Any) -> PreparedPicture:
    """A picture, uint8 RGB, at about this many pixels, as Qwen-Image-Edit shows it to the tower: sides in steps of 32, then of a token's.

    The tower reads films: a picture is one of two equal frames.
    """
    patch_px, frames = int(config.patch_size), int(config.temporal_patch_size)
    image = Image.fromarray(picture_HWC)
    size = fit_area(*image.size, area_px)
    image = image.resize(size, Image.Resampling.LANCZOS) if size != image.size else image
    size = fit_tokens(*size, patch_px * MERGE)
    image = image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image
    values_HWC = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)
    values_HWC = (values_HWC - torch.tensor(_MEAN)) / torch.tensor(_STD)
    rows, columns = size[1] // patch_px, size[0] // patch_px
    grid = values_HWC.view(rows, patch_px, columns, patch_px, 3).permute(0, 2, 4, 1, 3)  # (H, W, 3, patch, patch)
    grid = grid.unsqueeze(3).expand(-1, -1, -1, frames, -1, -1).reshape(rows, columns, -1)
    return PreparedPicture(_by_token(grid), rows, columns)


def fit_area(width_px: int, height_px: int, area_px: int) -> tuple[int, int]:
    """The size of the same shape with about this area, in steps of 32; a strip is made wider. Example: 4000x3000, 384x384 -> 448x320."""
    longest = area_px // RECIPE_STEP_PX
    width = math.sqrt(area_px * width_px / height_px)
    sides = (round(side / RECIPE_STEP_PX) * RECIPE_STEP_PX for side in (width, width * height_px / width_px))
    fitted_width, fitted_height = (min(longest, max(RECIPE_STEP_PX, side)) for side in sides)
    return fitted_width, fitted_height


def fit_tokens(width_px: int, height_px: int, step_px: int) -> tuple[int, int]:
    """The nearest size in whole tokens. Example: 448x320 -> 448x308 in steps of 28."""
    return max(step_px, round(width_px / step_px) * step_px), max(step_px, round(height_px / step_px) * step_px)
