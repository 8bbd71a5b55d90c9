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
NUM_EXTRA_IDS = 100
"""Markers of T5's training task, the last ids of the vocabulary. A prompt gets one only by writing `<extra_id_7>`."""


@cache
def read_vocabulary() -> SentencePieceModel:
    """The 32,000 published pieces."""
    packed = (resources.files(__package__) / "data" / "t5_spiece.model.xz").read_bytes()
    return read_sentencepiece(lzma.decompress(packed))


def build_t5_tokenizer() -> T5Tokenizer:
    """A transformers T5Tokenizer with the published vocabulary."""
    from transformers import T5Tokenizer  # heavy: only when text is first encoded

    model = read_vocabulary()
    extra = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(NUM_EXTRA_IDS))]
    return T5Tokenizer(vocab=[*model.pieces, *extra], _spm_precompiled_charsmap=model.charsmap)
