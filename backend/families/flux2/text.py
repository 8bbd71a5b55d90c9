"""Flux.2-klein's text recipe: Qwen3's stream after a quarter, a half and three quarters of its layers, of the prompt as a question in a chat that is
answered without thinking. Shorter texts are padded to 512 tokens, whose features the network reads too.

Shapes: B prompts, L tokens, D three times the width of Qwen3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from backend.families.family import TextEngine
from backend.families.qwen_text import NAME, qwen3
from backend.nn.padded_text import TEXT_LENGTHS
from backend.text_processing.chat_engine import ChatTextProcessingEngine, Template
from backend.text_processing.qwen_tokenizer import END_OF_TEXT, build_qwen_tokenizer
from backend.text_processing.textual_inversion import EmbeddingDatabase

QWEN3 = 0
LENGTH = 512
TEMPLATE = Template(
    before="<|im_start|>user\n",
    after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    trained_length=LENGTH,
    padded_length=LENGTH,
    pad_token=END_OF_TEXT,
)


def quarters(num_layers: int) -> tuple[int, ...]:
    """Layers 9, 18 and 27 of 36."""
    return tuple(max(1, num_layers * number // 4) for number in (1, 2, 3))


TEXT_ENCODERS = (qwen3("qwen_3_4b.safetensors (8.0 GB; for klein 9B qwen_3_8b.safetensors, 15.1 GB)", reads=quarters),)


def build_text_engines(encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], embeddings: EmbeddingDatabase) -> Sequence[TextEngine]:
    return [ChatTextProcessingEngine(encoders[NAME], tokenizers[NAME], TEMPLATE)]


def build_token_counter() -> TextEngine:
    """Qwen3's tokens, without Qwen3."""
    return ChatTextProcessingEngine(nn.Identity(), build_qwen_tokenizer(), TEMPLATE)


def encode(side: Any, prompt: Sequence[str]) -> dict[str, Tensor]:
    """ "crossattn" (B, L, D) and "text_lengths" (B,)."""
    text_BLD, lengths_B = side.run_text_engine(QWEN3, prompt)
    return {"crossattn": text_BLD, TEXT_LENGTHS: lengths_B}
