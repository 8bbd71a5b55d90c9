"""Narrow random CLIP text encoders with the full vocabulary, for tests."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from backend.text_processing.clip_tokenizer import EOS_TOKEN_ID, build_clip_tokenizer

WIDTH = 32
NUM_LAYERS = 4


@cache
def tokenizer(pad_token_id: int = EOS_TOKEN_ID) -> Any:
    return build_clip_tokenizer(pad_token_id=pad_token_id)


@cache
def encoder(*, projection: bool = False, seed: int = 0, width: int = WIDTH) -> Any:
    """A CLIPTextModel, with `projection` one with a projection to 24 channels. Equal arguments return the same object: do not modify it."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=24,
        hidden_act="gelu" if projection else "quick_gelu",
        bos_token_id=49406,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=EOS_TOKEN_ID,
    )
    torch.manual_seed(seed)
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    for parameter in model.parameters():  # with transformers' small initial values all prompts would look alike
        torch.nn.init.normal_(parameter, std=0.2)
    return model
