"""Encodes prompts with a language model: a template around the prompt, one sequence that grows with it, emphasis and BREAK as for CLIP.

Shapes: B prompts, L tokens, D encoder width. Must not know prompt schedules, model families or options: everything variable is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from backend.nn.padded_text import stack_texts
from backend.text_processing.chunks import PromptTooLongError
from backend.text_processing.clip_tokenizer import tokenize_plain
from backend.text_processing.emphasis import DEFAULT_EMPHASIS, apply_emphasis, resolve_emphasis_name
from backend.text_processing.parsing import parse_prompt_attention

MAX_LENGTH = 4096
"""Most tokens between two BREAKs. Networks were trained on less than a quarter of this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """What stands before and after a prompt. `num_dropped`: tokens at the start whose features are left out. `trained_length`: for the counter.

    `padded_length`: shorter texts get tokens `pad_token` behind them up to this many, whose features count too.
    """

    before: str = ""
    after: str = ""
    num_dropped: int = 0
    trained_length: int = 512
    padded_length: int = 0
    pad_token: int = 0


@dataclass(slots=True)
class ChatChunk:
    """The prompt's tokens between two BREAKs, without the template."""

    tokens: list[int] = field(default_factory=list)
    multipliers: list[float] = field(default_factory=list)


class ChatTextProcessingEngine:
    """Callable: prompts in, (features (B, L, D) fp32 with zeros behind shorter ones, their lengths (B,)) out.

    `text_encoder` takes ids (B, L), with a template that pads also a mask (B, L) that is 0 for padding, and returns features (B, L, D). Every text is
    encoded alone. Not safe to call from two threads.
    """

    comma_padding_backtrack = 0

    def __init__(self, text_encoder: nn.Module, tokenizer: Any, template: Template, emphasis_name: str = DEFAULT_EMPHASIS) -> None:
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.template = template
        self.emphasis_name = resolve_emphasis_name(emphasis_name)
        self._used_weights = False

    def set_emphasis(self, name: str) -> None:
        """Choose the emphasis mode for the following prompts. An unknown name is reported and means "Original"."""
        self.emphasis_name = resolve_emphasis_name(name)

    def set_clip_skip(self, clip_skip: int) -> None:
        """Does nothing: which layer is read belongs to the family."""

    def take_generation_params(self) -> dict[str, str]:
        """Infotext fields for the prompts encoded since the last call: "Emphasis" if it is not the default."""
        is_worth_saying = self._used_weights and self.emphasis_name != DEFAULT_EMPHASIS
        self._used_weights = False
        return {"Emphasis": self.emphasis_name} if is_worth_saying else {}

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, of any length."""
        return tokenize_plain(self.tokenizer, texts)

    def tokenize_line(self, line: str) -> tuple[list[ChatChunk], int]:
        """(chunks, number of tokens) of one prompt without schedules and without the template."""
        spans = parse_prompt_attention(line, self.emphasis_name)
        chunks = [ChatChunk()]
        for span, tokens in zip(spans, self.tokenize([span.text for span in spans])):
            if span.is_break:
                chunks.append(ChatChunk())
                continue
            chunks[-1].tokens += tokens
            chunks[-1].multipliers += [span.weight] * len(tokens)
        return chunks, sum(len(chunk.tokens) for chunk in chunks)

    def get_prompt_lengths(self, text: str) -> tuple[int, int]:
        """(tokens used, tokens that the model was trained on) for the counter at the prompt box."""
        _, num_tokens = self.tokenize_line(text)
        return num_tokens, max(self.template.trained_length, num_tokens)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Parts between BREAKs are encoded separately, each in its template, and joined. Raises: PromptTooLongError."""
        chunks_of_text = {text: self.tokenize_line(text)[0] for text in texts}
        every = [chunk for chunks in chunks_of_text.values() for chunk in chunks]
        longest = max((len(chunk.tokens) for chunk in every), default=0)
        if longest > MAX_LENGTH:
            raise PromptTooLongError(
                f"prompt: the text encoder got {longest} tokens at once, but the limit is {MAX_LENGTH}. Shorten the prompt, or split it with BREAK."
            )
        self._used_weights |= any(weight != 1.0 for chunk in every for weight in chunk.multipliers)
        encoded = {text: torch.cat([self._encode(chunk) for chunk in chunks]) for text, chunks in chunks_of_text.items()}
        return stack_texts([encoded[text] for text in texts])

    def _encode(self, chunk: ChatChunk) -> Tensor:
        """(L, D) of a chunk in its template."""
        before, after = self._frame()
        tokens = [*before, *chunk.tokens, *after]
        num_pads = max(0, self.template.padded_length - len(tokens))
        multipliers = [1.0] * len(before) + chunk.multipliers + [1.0] * (len(after) + num_pads)
        with torch.no_grad():
            z_1LD = self._run(tokens, num_pads).float()
        weights_1L = torch.tensor([multipliers], dtype=z_1LD.dtype, device=z_1LD.device)
        return apply_emphasis(self.emphasis_name, z_1LD, weights_1L)[0, self.num_dropped :]

    @property
    def num_dropped(self) -> int:
        """Tokens at the start whose features are left out."""
        return self.template.num_dropped

    def _frame(self) -> tuple[list[int], list[int]]:
        """The tokens before and after the prompt."""
        before, after = self.tokenize([self.template.before, self.template.after])
        return before, after

    def _run(self, tokens: list[int], num_pads: int) -> Tensor:
        """The encoder's features (1, L, D), with those of so many tokens of padding."""
        encoder: Any = self.text_encoder
        device = encoder.get_input_embeddings().weight.device
        masks = [torch.tensor([[1] * len(tokens) + [0] * num_pads], device=device)] if num_pads else []
        return encoder(torch.tensor([tokens + [self.template.pad_token] * num_pads], device=device), *masks)  # type: ignore[no-any-return]
