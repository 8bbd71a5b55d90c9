"""Encodes prompts with T5: emphasis and BREAK as for CLIP, but without windows: one sequence of tokens that grows with the prompt.

Shapes: B prompts, L tokens, D encoder width. Must not know prompt schedules, model families or options: everything variable is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from backend.text_processing.chunks import PromptTooLongError
from backend.text_processing.clip_tokenizer import tokenize_plain
from backend.text_processing.emphasis import DEFAULT_EMPHASIS, apply_emphasis, resolve_emphasis_name
from backend.text_processing.parsing import parse_prompt_attention
from backend.text_processing.t5_tokenizer import END_TOKEN_ID, PAD_TOKEN_ID

MIN_LENGTH = 256
MAX_LENGTH = 4096
"""Most tokens between two BREAKs. Attention's memory grows with their square; networks were trained on less than a tenth of this."""
MAX_TOTAL_LENGTH = 4 * MAX_LENGTH
"""Most tokens of a prompt, padding included: each part between two BREAKs is padded to the longest."""


@dataclass(slots=True)
class T5Chunk:
    """The tokens between two BREAKs, with the end token last."""

    tokens: list[int] = field(default_factory=list)
    multipliers: list[float] = field(default_factory=list)

    def padded(self, length: int) -> T5Chunk:
        num_missing = length - len(self.tokens)
        return T5Chunk(self.tokens + [PAD_TOKEN_ID] * num_missing, self.multipliers + [1.0] * num_missing)


class T5TextProcessingEngine:
    """Callable: prompts in, conditions z_BLD out, always float32.

    All texts of one call are padded to the longest one, and at least to `min_length`, with 0, which the encoder reads like any token (as in Flux's
    and SD3's training). Each text is encoded separately, so that apart from its padding a row does not depend on the other texts of the call.
    Not safe to call from two threads at once.
    """

    comma_padding_backtrack = 0

    def __init__(self, text_encoder: nn.Module, tokenizer: Any, emphasis_name: str = DEFAULT_EMPHASIS, min_length: int = MIN_LENGTH) -> None:
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.min_length = min_length
        self.emphasis_name = resolve_emphasis_name(emphasis_name)
        self.id_end, self.id_pad = END_TOKEN_ID, PAD_TOKEN_ID
        self._used_weights = False

    # what a caller sets

    def set_emphasis(self, name: str) -> None:
        """Choose the emphasis mode for the following prompts. An unknown name is reported and means "Original"."""
        self.emphasis_name = resolve_emphasis_name(name)

    def set_clip_skip(self, clip_skip: int) -> None:
        """Does nothing: T5 is always read after its last layer."""

    def take_generation_params(self) -> dict[str, str]:
        """Infotext fields for the prompts encoded since the last call: "Emphasis" if it is not the default."""
        is_worth_saying = self._used_weights and self.emphasis_name != DEFAULT_EMPHASIS
        self._used_weights = False
        return {"Emphasis": self.emphasis_name} if is_worth_saying else {}

    # prompts to tokens

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, of any length, without end tokens."""
        return tokenize_plain(self.tokenizer, texts)

    def tokenize_line(self, line: str) -> tuple[list[T5Chunk], int]:
        """(chunks without padding, tokens without end tokens) of one prompt without schedules."""
        spans = parse_prompt_attention(line, self.emphasis_name)
        chunks = [T5Chunk()]
        for span, tokens in zip(spans, self.tokenize([span.text for span in spans])):
            if span.is_break:
                chunks.append(T5Chunk())
                continue
            chunks[-1].tokens += tokens
            chunks[-1].multipliers += [span.weight] * len(tokens)
        num_tokens = sum(len(chunk.tokens) for chunk in chunks)
        for chunk in chunks:
            chunk.tokens.append(self.id_end)
            chunk.multipliers.append(1.0)
        return chunks, num_tokens

    def process_texts(self, texts: Sequence[str]) -> tuple[list[list[T5Chunk]], int]:
        """(chunks of each prompt, highest token count)."""
        lines = {text: self.tokenize_line(text) for text in texts}
        return [lines[text][0] for text in texts], max((count for _, count in lines.values()), default=0)

    def get_prompt_lengths(self, text: str) -> tuple[int, int]:
        """(tokens used, tokens that fit without growing) for the counter at the prompt box."""
        _, num_tokens = self.process_texts([text])
        return num_tokens, max(self.min_length - 1, num_tokens)

    # tokens to vectors

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The condition z_BLD of each prompt. Parts after a BREAK are encoded separately and appended; prompts with fewer parts get empty ones.

        Raises: PromptTooLongError.
        """
        chunks_of_prompt, _ = self.process_texts(texts)
        self.note_weights(chunks_of_prompt)
        num_chunks = max((len(chunks) for chunks in chunks_of_prompt), default=1)
        length = max([self.min_length, *(len(chunk.tokens) for chunks in chunks_of_prompt for chunk in chunks)])
        check_length(length, num_chunks)
        empty = T5Chunk([self.id_end], [1.0])
        known: dict[tuple[tuple[int, ...], tuple[float, ...]], Tensor] = {}
        rows = []
        for chunks in chunks_of_prompt:
            full = [chunk.padded(length) for chunk in [*chunks, *[empty] * (num_chunks - len(chunks))]]
            for chunk in full:
                key = (tuple(chunk.tokens), tuple(chunk.multipliers))
                if key not in known:
                    known[key] = self.process_tokens(chunk.tokens, chunk.multipliers)
            rows.append(torch.cat([known[tuple(chunk.tokens), tuple(chunk.multipliers)] for chunk in full]))
        return torch.stack(rows)

    def note_weights(self, chunks_of_prompt: Sequence[Sequence[T5Chunk]]) -> None:
        """Remember for the infotext whether prompts have weights."""
        self._used_weights |= any(weight != 1.0 for chunks in chunks_of_prompt for chunk in chunks for weight in chunk.multipliers)

    def process_tokens(self, tokens: Sequence[int], multipliers: Sequence[float]) -> Tensor:
        """The features z_LD of one padded sequence of tokens, with emphasis applied."""
        z_1LD = self.encode_with_transformers(torch.tensor([list(tokens)]))
        weights_1L = torch.tensor([list(multipliers)], dtype=z_1LD.dtype, device=z_1LD.device)
        return apply_emphasis(self.emphasis_name, z_1LD, weights_1L)[0]

    def encode_with_transformers(self, tokens_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """z_BLD of token rows. `mask_BL`: 1 for tokens that others read; without it, all."""
        encoder: Any = self.text_encoder
        device = encoder.get_input_embeddings().weight.device
        with torch.no_grad():
            mask_BL = None if mask_BL is None else mask_BL.to(device)
            features: Tensor = encoder(input_ids=tokens_BL.to(device), attention_mask=mask_BL).last_hidden_state
        return features.float()


def check_length(length: int, num_chunks: int) -> None:
    """Whether `num_chunks` parts, the longest of `length` tokens, can be encoded. Raises: PromptTooLongError."""
    if length > MAX_LENGTH:
        raise PromptTooLongError(
            f"prompt: T5 got {length} tokens at once, but the limit is {MAX_LENGTH}. Shorten the prompt, or split it with BREAK."
        )
    if (total := num_chunks * max(length, MIN_LENGTH)) > MAX_TOTAL_LENGTH:
        raise PromptTooLongError(
            f"prompt: T5 got {num_chunks} parts, padded to {total} tokens, but the limit is {MAX_TOTAL_LENGTH}. Remove some BREAKs."
        )
