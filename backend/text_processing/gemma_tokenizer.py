"""Gemma's tokenizer, built from the SentencePiece model that users' text encoder files contain. No vocabulary of Gemma's is shipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from backend.text_processing.sentencepiece_file import CONTROL, NORMAL, USER_DEFINED, SentencePieceModel

if TYPE_CHECKING:
    from transformers import GemmaTokenizer

BOS = "<bos>"
MAX_PIECE_LENGTH = 128
"""Longer pieces come from no merge. Gemma's longest has 31 characters but for runs of spaces and line breaks."""


def build_gemma_tokenizer(model: SentencePieceModel) -> GemmaTokenizer:
    """A transformers GemmaTokenizer with these pieces: BPE with bytes for what is unknown, spaces written as U+2581, markers kept whole."""
    from transformers import AddedToken, GemmaTokenizer  # heavy: only when a text encoder is loaded

    vocab = {text: number for number, (text, _) in enumerate(model.pieces)}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=find_merges(model, vocab))
    kinds = model.kinds or (NORMAL,) * len(model.pieces)
    kept = [(text, kind) for (text, _), kind in zip(model.pieces, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=kind == CONTROL) for text, kind in kept])
    return tokenizer


def find_merges(model: SentencePieceModel, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the most probable piece first; SentencePiece merges by its score, `tokenizers` by this order.

    Linear in the pieces' number, quadratic in the length of one, which is bounded.
    """
    kinds = model.kinds or (NORMAL,) * len(model.pieces)
    found: list[tuple[float, int, int, str, str]] = []
    for (text, score), kind in zip(model.pieces, kinds, strict=True):
        if kind != NORMAL or not 1 < len(text) <= MAX_PIECE_LENGTH:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                found.append((-score, vocab[left], vocab[right], left, right))
    found.sort()
    return [(left, right) for _, _, _, left, right in found]
