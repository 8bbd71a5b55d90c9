"""Anima's text recipe: one prompt read twice. Qwen3-0.6B's features of the plain prompt, and T5's tokens of it, which the network embeds itself.

Emphasis weighs T5's tokens; Qwen3 reads the words without it. BREAK only separates words.

Shapes: B prompts, S tokens of Qwen3, T tokens of T5, D width of Qwen3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backend.families.anima.program import LEAST_TEXT_TOKENS
from backend.families.family import TextEngine
from backend.families.qwen_text import NAME, qwen3_normed
from backend.nn.padded_text import TEXT_LENGTHS, stack_texts
from backend.nn.second_text import SECOND_TEXT
from backend.text_processing.clip_tokenizer import tokenize_plain
from backend.text_processing.parsing import parse_prompt_attention
from backend.text_processing.qwen_tokenizer import END_OF_TEXT
from backend.text_processing.t5_engine import T5Chunk, T5TextProcessingEngine, check_length
from backend.text_processing.t5_tokenizer import build_t5_tokenizer
from backend.text_processing.textual_inversion import EmbeddingDatabase

BOTH = 0
TEXT_ENCODERS = (qwen3_normed("qwen_3_06b_base.safetensors (1.2 GB)"),)
_NAMES = ("crossattn", TEXT_LENGTHS, *SECOND_TEXT)


class TwofoldEngine(T5TextProcessingEngine):
    """Callable: prompts in; Qwen3's features (B, S, D) fp32 and their lengths (B,), T5's ids (B, T), their lengths (B,) and weights (B, T) out.

    `text_encoder` is Qwen3, `qwen_tokenizer` its tokenizer; the token counter shows T5's.
    """

    def __init__(self, text_encoder: nn.Module, qwen_tokenizer: Any) -> None:
        super().__init__(text_encoder, build_t5_tokenizer(), min_length=LEAST_TEXT_TOKENS)
        self.qwen_tokenizer = qwen_tokenizer

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, ...]:  # type: ignore[override]  # the second reading comes with it
        """Raises: PromptTooLongError."""
        chunks_of_prompt, _ = self.process_texts(texts)
        self.note_weights(chunks_of_prompt)
        second = [_join(chunks) for chunks in chunks_of_prompt]
        longest = max(LEAST_TEXT_TOKENS, *(len(chunk.tokens) for chunk in second))
        check_length(longest, 1)
        padded = [chunk.padded(longest) for chunk in second]
        features_BSD, lengths_B = stack_texts([self._read(text) for text in texts])
        device = features_BSD.device
        return (
            features_BSD,
            lengths_B,
            torch.tensor([chunk.tokens for chunk in padded], device=device),
            torch.tensor([len(chunk.tokens) for chunk in second], device=device),
            torch.tensor([chunk.multipliers for chunk in padded], device=device),
        )

    def _read(self, text: str) -> Tensor:
        """Qwen3's features (S, D) of a prompt's words; of the end of a text for an empty one."""
        words = " ".join("".join(part) for part in _words_between_breaks(text, self.emphasis_name))
        (tokens,) = tokenize_plain(self.qwen_tokenizer, [words])
        encoder: Any = self.text_encoder
        with torch.no_grad():
            found: Tensor = encoder(torch.tensor([tokens or [END_OF_TEXT]], device=encoder.get_input_embeddings().weight.device))
        return found[0].float()


def _words_between_breaks(text: str, emphasis_name: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for span in parse_prompt_attention(text, emphasis_name):
        if span.is_break:
            parts.append([])
        else:
            parts[-1].append(span.text)
    return parts


def _join(chunks: Sequence[T5Chunk]) -> T5Chunk:
    """The tokens of all parts with one end."""
    tokens = [token for chunk in chunks for token in chunk.tokens[:-1]]
    weights = [weight for chunk in chunks for weight in chunk.multipliers[:-1]]
    return T5Chunk([*tokens, chunks[-1].tokens[-1]], [*weights, 1.0])


def build_text_engines(encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], embeddings: EmbeddingDatabase) -> Sequence[TextEngine]:
    return [TwofoldEngine(encoders[NAME], tokenizers[NAME])]


def build_token_counter() -> TextEngine:
    """T5's tokens, without an encoder."""
    return TwofoldEngine(nn.Identity(), None)


def encode(side: Any, prompt: Sequence[str]) -> dict[str, Tensor]:
    """ "crossattn" (B, S, D), "text_lengths" (B,), and the second reading."""
    return dict(zip(_NAMES, side.run_text_engine(BOTH, prompt), strict=True))
