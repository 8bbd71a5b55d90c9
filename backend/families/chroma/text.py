"""Chroma's text recipe: T5's features of the prompt's own tokens, of its end, and of one token of padding.

In training T5 did not read the padding, and the transformer saw the first token of it, no more. Padding has no position, so leaving the rest out is
the same as masking it.

Shapes: B prompts, L tokens, D width of T5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backend.families.family import TextEngine
from backend.families.t5_text import t5xxl
from backend.nn.padded_text import TEXT_LENGTHS, stack_texts
from backend.text_processing.emphasis import apply_emphasis
from backend.text_processing.t5_engine import T5Chunk, T5TextProcessingEngine, check_length
from backend.text_processing.t5_tokenizer import build_t5_tokenizer
from backend.text_processing.textual_inversion import EmbeddingDatabase

T5 = 0
TRAINED_LENGTH = 512
TEXT_ENCODERS = (t5xxl(lambda file, part, found: True),)


class PaddingBlindT5Engine(T5TextProcessingEngine):
    """Callable: prompts in, (features (B, L, D) fp32 with zeros behind shorter ones, their lengths (B,)) out."""

    def __init__(self, text_encoder: nn.Module, tokenizer: Any) -> None:
        super().__init__(text_encoder, tokenizer, min_length=1)

    def get_prompt_lengths(self, text: str) -> tuple[int, int]:
        """(tokens used, tokens of the longest text in training)."""
        num_tokens = self.process_texts([text])[1]
        return num_tokens, max(TRAINED_LENGTH - 1, num_tokens)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # with lengths
        """Parts between BREAKs are encoded separately and joined. Raises: PromptTooLongError."""
        chunks_of_prompt, _ = self.process_texts(texts)
        self.note_weights(chunks_of_prompt)
        check_length(max(len(chunk.tokens) for chunks in chunks_of_prompt for chunk in chunks), max(map(len, chunks_of_prompt)))
        return stack_texts([torch.cat([self._encode(chunk) for chunk in chunks]) for chunks in chunks_of_prompt])

    def _encode(self, chunk: T5Chunk) -> Tensor:
        """(L, D), with the token of padding."""
        padded = chunk.padded(len(chunk.tokens) + 1)
        mask_1L = torch.ones(1, len(padded.tokens), dtype=torch.int64)
        mask_1L[:, -1] = 0
        z_1LD = self.encode_with_transformers(torch.tensor([padded.tokens]), mask_1L)
        weights_1L = torch.tensor([padded.multipliers], dtype=z_1LD.dtype, device=z_1LD.device)
        return apply_emphasis(self.emphasis_name, z_1LD, weights_1L)[0]


def build_text_engines(encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], embeddings: EmbeddingDatabase) -> Sequence[TextEngine]:
    return [PaddingBlindT5Engine(encoders["t5xxl"], tokenizers["t5xxl"])]


def build_token_counter() -> TextEngine:
    """T5's tokens, without T5."""
    return PaddingBlindT5Engine(nn.Identity(), build_t5_tokenizer())


def encode(side: Any, prompt: Sequence[str]) -> dict[str, Tensor]:
    """ "crossattn" (B, L, D) and "text_lengths" (B,)."""
    text_BLD, lengths_B = side.run_text_engine(T5, prompt)
    return {"crossattn": text_BLD, TEXT_LENGTHS: lengths_B}
