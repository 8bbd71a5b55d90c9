"""Krea 2's text recipe: Qwen3-VL's features after every third layer, side by side, of the prompt in Qwen-Image's chat about describing pictures,
without those of the instruction.

Shapes: B prompts, L tokens, D width of Qwen3-VL times the number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from backend.families.family import TextEngine
from backend.families.qwen_text import VL_NAME, qwen3_vl
from backend.families.qwenimage.text import TEMPLATE
from backend.nn.padded_text import TEXT_LENGTHS
from backend.text_processing.chat_engine import ChatTextProcessingEngine
from backend.text_processing.qwen_tokenizer import build_qwen_tokenizer
from backend.text_processing.textual_inversion import EmbeddingDatabase

QWEN3_VL = 0


def every_third(num_layers: int) -> tuple[int, ...]:
    """The layers that are read, counted from 1. Example: of 36 they are 2, 5, 8 .. 35."""
    return tuple(range(2, num_layers, 3))


TEXT_ENCODERS = (qwen3_vl("qwen3vl_4b_bf16.safetensors (8.9 GB)", every_third),)


def build_text_engines(encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], embeddings: EmbeddingDatabase) -> Sequence[TextEngine]:
    return [ChatTextProcessingEngine(encoders[VL_NAME], tokenizers[VL_NAME], TEMPLATE)]


def build_token_counter() -> TextEngine:
    """Qwen's tokens, without Qwen3-VL."""
    return ChatTextProcessingEngine(nn.Identity(), build_qwen_tokenizer(), TEMPLATE)


def encode(side: Any, prompt: Sequence[str]) -> dict[str, Tensor]:
    """ "crossattn" (B, L, D) and "text_lengths" (B,)."""
    text_BLD, lengths_B = side.run_text_engine(QWEN3_VL, prompt)
    return {"crossattn": text_BLD, TEXT_LENGTHS: lengths_B}
