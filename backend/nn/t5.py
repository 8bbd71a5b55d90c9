"""The T5 encoder of transformers, made safe for half precision, with a single token table.

In fp16 the residual stream and the product in the feed-forward layers overflow (65504). So the stream is kept in fp32, and that product is scaled
per token by a power of two before the last matrix and back after it; matrices keep their dtype.

Shapes: B prompts, L tokens, D width, F width of the feed-forward layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

MAX_DISTANCE = 128
"""Tokens farther apart share a bucket of the position bias. The same in every published T5."""


@dataclass(frozen=True, kw_only=True, slots=True)
class T5Shape:
    """A T5 encoder's structure, derived from its shapes."""

    vocab_length: int
    width: int
    inner_width: int
    num_heads: int
    head_width: int
    num_layers: int
    num_buckets: int


def t5_config(shape: T5Shape) -> T5Config:
    """The configuration of a T5 v1.1 encoder of this shape."""
    return T5Config(
        vocab_size=shape.vocab_length,
        d_model=shape.width,
        d_ff=shape.inner_width,
        d_kv=shape.head_width,
        num_heads=shape.num_heads,
        num_layers=shape.num_layers,
        relative_attention_num_buckets=shape.num_buckets,
        relative_attention_max_distance=MAX_DISTANCE,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )


class T5TextEncoder(T5EncoderModel):  # type: ignore[misc]
    """Token ids (B, L) in, features (B, L, D) out. Names are those of transformers, except that only the stack has the token table."""

    _tied_weights_keys: Any = None

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        del self.shared
        for block in self.encoder.block:
            block.layer[-1].DenseReluDense = GatedDense(config)

    def get_input_embeddings(self) -> nn.Embedding:
        return cast("nn.Embedding", self.encoder.embed_tokens)

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.encoder.set_input_embeddings(new_embeddings)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        embedded_BLD = self.encoder.embed_tokens(input_ids)
        stream_BLD = embedded_BLD.float() if embedded_BLD.dtype in (torch.float16, torch.bfloat16) else embedded_BLD
        return self.encoder(inputs_embeds=stream_BLD, attention_mask=attention_mask, **kwargs)


class GatedDense(nn.Module):
    """gelu(x wi_0) * (x wi_1), through wo. Unlike transformers', it never reads a weight's dtype, which may be a storage-only one."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_BLF, value_BLF = nn.functional.gelu(self.wi_0(x_BLD), approximate="tanh"), self.wi_1(x_BLD)
        if x_BLD.dtype is not torch.float16:
            return cast("Tensor", self.wo(gate_BLF * value_BLF))
        product_BLF = gate_BLF.float() * value_BLF.float()
        scale_BL1 = torch.exp2(torch.ceil(torch.log2(product_BLF.abs().amax(dim=-1, keepdim=True).clamp(min=1.0))))
        return cast("Tensor", self.wo((product_BLF / scale_BL1).half()).float() * scale_BL1)
