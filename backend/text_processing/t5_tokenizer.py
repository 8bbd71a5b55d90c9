"""T5's tokenizer, rebuilt from its published vocabulary without a model hub (see `data/NOTICE.md`)."""

from __future__ import annotations

import lzma
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from backend.text_processing.sentencepiece_file import SentencePieceModel, read_sentencepiece

if TYPE_CHECKING:
    from transformers import T5Tokenizer

PAD_TOKEN_ID = 0
END_TOKEN_ID = 1
VOCAB_LENGTH = 32100
_UNKNOWN = "<unk>"
NUM_EXTRA_IDS = 100
"""Markers of T5's training task, the last ids of the vocabulary. A prompt gets one only by writing `<extra_id_7>`."""


@cache
def read_vocabulary() -> SentencePieceModel:
    """The 32,000 published pieces."""
    packed = (resources.files(__package__) / "data" / "t5_spiece.model.xz").read_bytes()
    return read_sentencepiece(lzma.decompress(packed))


def build_t5_tokenizer(model: SentencePieceModel | None = None) -> T5Tokenizer:
    """A transformers T5Tokenizer with the published vocabulary, or with a file's pieces in the place of the published ones.

    Raises: ValueError if these have no piece for what is unknown.
    """
    from transformers import T5Tokenizer  # heavy: only when text is first encoded

    published = read_vocabulary()
    pieces = published.pieces if model is None else model.pieces[: VOCAB_LENGTH - NUM_EXTRA_IDS]
    if not any(text == _UNKNOWN for text, _ in pieces):
        raise ValueError(f"its {len(pieces)} pieces have no {_UNKNOWN}")
    extra = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(NUM_EXTRA_IDS))]
    return T5Tokenizer(vocab=[*pieces, *extra], _spm_precompiled_charsmap=published.charsmap)
