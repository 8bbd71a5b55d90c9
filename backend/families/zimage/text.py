"""Z-Image's text recipe: Qwen3's features, before its last layer, of the prompt as a question in a chat.

Shapes: B prompts, L tokens, D width of Qwen3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from backend.families.family import TextEngine
from backend.families.qwen_text import NAME, qwen3
from backend.nn.padded_text import TEXT_LENGTHS
from backend.text_processing.chat_engine import ChatTextProcessingEngine, Template
from backend.text_processing.qwen_tokenizer import build_qwen_tokenizer
from backend.text_processing.textual_inversion import EmbeddingDatabase

QWEN3 = 0
TEMPLATE = Template(before="<|im_start|>user\n", after="<|im_end|>\n<|im_start|>assistant\n")
TEXT_ENCODERS = (qwen3("qwen_3_4b.safetensors (8.0 GB)"),)


def build_text_engines(encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], embeddings: EmbeddingDatabase) -> Sequence[TextEngine]:
    return [ChatTextProcessingEngine(encoders[NAME], tokenizers[NAME], TEMPLATE)]


def build_token_counter() -> TextEngine:
    """Qwen3's tokens, without Qwen3."""
    return ChatTextProcessingEngine(nn.Identity(), build_qwen_tokenizer(), TEMPLATE)


def encode(side: Any, prompt: Sequence[str]) -> dict[str, Tensor]:
    """ "crossattn" (B, L, D) and "text_lengths" (B,)."""
    text_BLD, lengths_B = side.run_text_engine(QWEN3, prompt)
    return {"crossattn": text_BLD, TEXT_LENGTHS: lengths_B}
