"""Narrow random T5 encoders from transformers with the full vocabulary, and the files they are written to."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from backend.text_processing.t5_tokenizer import build_t5_tokenizer

WIDTH, NUM_HEADS, HEAD_WIDTH, INNER_WIDTH, NUM_LAYERS = 32, 3, 8, 48, 2


@cache
def t5_tokenizer() -> Any:
    return build_t5_tokenizer()


@cache
def t5_encoder(*, seed: int = 0, width: int = WIDTH, std: float = 0.3) -> Any:
    """transformers' own T5EncoderModel in fp32. Equal arguments return the same object: do not modify it."""
    config = T5Config(
        vocab_size=32128,
        d_model=width,
        d_ff=INNER_WIDTH,
        d_kv=HEAD_WIDTH,
        num_heads=NUM_HEADS,
        num_layers=NUM_LAYERS,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = T5EncoderModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=std)
    return model


def t5_state_dict(encoder: Any, prefix: str = "", *, table: str = "shared.weight") -> dict[str, Tensor]:
    """Its weights as stored in files: the token table once, as `table`, or under both names ("both")."""
    tensors = {prefix + key: value.clone() for key, value in encoder.state_dict().items()}
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        if table not in ("both", name):
            tensors.pop(prefix + name, None)
    return tensors


def write_t5(path: Path, encoder: Any, *, dtype: torch.dtype = torch.float32, more: Mapping[str, Tensor] | None = None, **layout: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.to(dtype) for key, tensor in {**t5_state_dict(encoder, **layout), **(more or {})}.items()}, path)
    return path
