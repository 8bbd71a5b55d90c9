"""The tokenizer of Qwen2, Qwen2.5 and Qwen3, rebuilt from its published merges without a model hub (see `data/NOTICE.md`)."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

VOCAB_LENGTH = 151_669
"""Byte symbols, merges and markers. Networks have a few more rows, which no text reaches."""
END_OF_TEXT = 151_643
"""The first marker, which also pads."""
_MARKERS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>",
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip
_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100))


@cache
def read_merges() -> tuple[str, ...]:
    """The published merges, each two symbols with a space between them, the most frequent first."""
    packed = (resources.files(__package__) / "data" / "qwen_merges.txt.xz").read_bytes()
    lines = lzma.decompress(packed).decode().split("\n")
    return tuple(line for line in lines if line and not line.startswith("#version"))


def byte_symbols() -> list[str]:
    """One visible character for every byte, in the order of their ids: printable bytes stand for themselves, the others for U+0100 and up."""
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    return [*map(chr, _PRINTABLE), *(chr(256 + number) for number in range(len(others)))]


def build_qwen_tokenizer() -> Qwen2Tokenizer:
    """A transformers Qwen2Tokenizer with the published vocabulary: byte symbols, then what each merge makes, then the markers."""
    merges = read_merges()
    symbols = [*byte_symbols(), *(merge.replace(" ", "") for merge in merges)]
    return build_byte_tokenizer([*symbols, *_MARKERS], merges, [False] * len(symbols) + [True] * len(_MARKERS))


def build_byte_tokenizer(tokens: Sequence[str], merges: Sequence[str], are_markers: Sequence[bool]) -> Qwen2Tokenizer:
    """A transformers Qwen2Tokenizer with these tokens by id and merges. Tokens from the first marker on are kept whole.

    Raises: ValueError for a merge of symbols that are no tokens, and for tokens that are there twice.
    """
    from transformers import AddedToken, Qwen2Tokenizer  # heavy: only when text is first encoded

    first_marker = next((number for number, is_marker in enumerate(are_markers) if is_marker), len(tokens))
    vocab = {token: number for number, token in enumerate(tokens[:first_marker])}
    if len(vocab) < first_marker:
        raise ValueError(f"{first_marker - len(vocab)} of its {first_marker} tokens are there twice")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    unknown = next((pair for pair in pairs if not {*pair, "".join(pair)} <= vocab.keys()), None)
    if unknown is not None:
        raise ValueError(f"it merges {unknown[0][:40]!r} and {unknown[1][:40]!r}, which are not all tokens")
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=pairs)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[first_marker:]])
    return tokenizer
