"""Lumina2's text recipe: Gemma2's features, before its last layer, of the published instruction and the prompt behind it.

A prompt that brings its own instruction, "... <Prompt Start> ...", keeps it; a negative prompt has none, as in the authors' pipeline.

Shapes: B prompts, L tokens, D width of Gemma2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from backend.families.family import TextEngine
from backend.families.gemma_text import NAME, gemma2
from backend.nn.padded_text import TEXT_LENGTHS
from backend.text_processing.chat_engine import ChatTextProcessingEngine, Template
from backend.text_processing.gemma_tokenizer import BOS
from backend.text_processing.textual_inversion import EmbeddingDatabase

GEMMA2 = 0
START = "<Prompt Start>"
INSTRUCTION = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based on textual prompts or user "
    "prompts."
)
TEMPLATE = Template(before=BOS, trained_length=256)
TEXT_ENCODERS = (gemma2("gemma_2_2b_fp16.safetensors (5.2 GB)"),)


def build_text_engines(encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], embeddings: EmbeddingDatabase) -> Sequence[TextEngine]:
    return [ChatTextProcessingEngine(encoders[NAME], tokenizers[NAME], TEMPLATE)]


def encode(side: Any, prompt: Sequence[str]) -> dict[str, Tensor]:
    """ "crossattn" (B, L, D) and "text_lengths" (B,)."""
    is_negative = getattr(prompt, "is_negative_prompt", False)
    texts = [text if is_negative or START in text else f"{INSTRUCTION} {START} {text}" for text in prompt]
    text_BLD, lengths_B = side.run_text_engine(GEMMA2, texts)
    return {"crossattn": text_BLD, TEXT_LENGTHS: lengths_B}
