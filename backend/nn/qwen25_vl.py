"""Qwen2.5-VL as a text encoder: token ids, and pictures among them, in; normalized features of the last layer out. Safe in half precision.

The layers are transformers'. The residual stream is fp32 in half precision, and in fp16 the products inside the MLPs are too.

Shapes: B prompts, L tokens, D width, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLRMSNorm

from backend.nn.qwen3 import run_decoder_layer
from backend.nn.qwen_vision import HEADS, MERGE, PreparedPicture, VisionTower
from backend.nn.stream_layers import Rope, half_frequencies, half_tables

THETA = 1_000_000.0
NORM_EPS = 1e-6
"""Of every published Qwen2.5-VL."""


class ShownPicture(NamedTuple):
    """A picture whose tokens begin at position `first` of the ids, which hold a placeholder for each of them."""

    first: int
    picture: PreparedPicture


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionShape:
    """The picture tower's structure."""

    width: int
    inner_width: int
    num_blocks: int
    patch_px: int
    frames: int


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenVlShape:
    """The structure, derived from shapes. `vision` is None for a file without the picture tower."""

    vocab_length: int
    width: int
    inner_width: int
    num_heads: int
    num_kv_heads: int
    num_layers: int
    vision: VisionShape | None


def text_config(shape: QwenVlShape) -> Qwen2_5_VLTextConfig:
    config = Qwen2_5_VLTextConfig(
        vocab_size=shape.vocab_length,
        hidden_size=shape.width,
        intermediate_size=shape.inner_width,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        num_hidden_layers=shape.num_layers,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    config._attn_implementation = "sdpa"  # layers outside of a transformers model fall back to one without a causal mask
    return config


def vision_config(shape: VisionShape, out_width: int) -> Qwen2_5_VLVisionConfig:
    config = Qwen2_5_VLVisionConfig(
        depth=shape.num_blocks, hidden_size=shape.width, intermediate_size=shape.inner_width, num_heads=HEADS, patch_size=shape.patch_px,
        temporal_patch_size=shape.frames, out_hidden_size=out_width,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return config


class QwenVlTextEncoder(nn.Module):
    """Token ids (B, L) in, features (B, L, D) out. Names are those of transformers' language model; the tower is `visual`."""

    def __init__(self, shape: QwenVlShape) -> None:
        super().__init__()
        config = text_config(shape)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Qwen2_5_VLDecoderLayer(config, number) for number in range(config.num_hidden_layers)])
        self.norm = Qwen2_5_VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.visual = VisionTower(vision_config(shape.vision, shape.width)) if shape.vision is not None else None

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def forward(self, input_ids: Tensor, pictures: Sequence[ShownPicture] = ()) -> Tensor:
        """`pictures` take the place of their tokens, in order; all prompts see the same ones."""
        embedded_BLD: Tensor = self.embed_tokens(input_ids)
        for first, picture in pictures:
            assert self.visual is not None, "the engine refuses pictures without a tower"
            embedded_BLD[:, first : first + picture.num_tokens] = self.visual(picture).to(embedded_BLD.dtype)
        dtype = embedded_BLD.dtype
        stream_BLD = embedded_BLD.float() if dtype in (torch.float16, torch.bfloat16) else embedded_BLD
        rope = self._rope(place_tokens(input_ids.shape[1], pictures).to(input_ids.device), dtype)
        for layer in self.layers:
            stream_BLD = run_decoder_layer(layer, stream_BLD, rope, dtype)
        return self.norm(stream_BLD)  # type: ignore[no-any-return]

    def _rope(self, places_L3: Tensor, dtype: torch.dtype) -> Rope:
        """Cosines and sines (1, L, K): the first quarter of a head's angles for time, then row and column (16, 24, 24 of 64)."""
        head_width = self.config.hidden_size // self.config.num_attention_heads
        shares = axis_shares(head_width)
        axes = torch.repeat_interleave(torch.arange(3), torch.tensor(shares)).to(places_L3.device)
        angles_1LK = (places_L3[:, axes].float() * half_frequencies(head_width, THETA, places_L3.device))[None]
        return half_tables(angles_1LK, dtype)


def axis_shares(head_width: int) -> tuple[int, int, int]:
    """How many of a head's angles turn by time, row and column. Example: 128 -> (16, 24, 24)."""
    half = head_width // 2
    side = half * 3 // 8
    return half - 2 * side, side, side


def place_tokens(length: int, pictures: Sequence[ShownPicture]) -> Tensor:
    """Places (L, 3) of tokens: time, row and column. A text's are alike and count up; a picture's rows and columns count from where it begins,
    and the text after it goes on behind its longer side. Bai et al. 2025, "Qwen2.5-VL", section 2.1.2.

    Example: 2 tokens, a picture of 2x3 tokens, 1 token -> (0 0 0) (1 1 1), (2 2 2) (2 2 3) (2 2 4) (2 3 2) (2 3 3) (2 3 4), (5 5 5).
    """
    parts: list[Tensor] = []
    place = position = 0
    for first, picture in pictures:
        parts.append(torch.arange(place, place + first - position)[:, None].expand(-1, 3))
        place += first - position
        rows, columns = picture.rows // MERGE, picture.columns // MERGE
        grid = torch.stack(torch.meshgrid(torch.zeros(1, dtype=torch.int64), torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
        parts.append(grid.reshape(-1, 3) + place)
        place, position = place + max(rows, columns), first + picture.num_tokens
    parts.append(torch.arange(place, place + length - position)[:, None].expand(-1, 3))
    return torch.cat(parts)
