"""CLIP's byte-pair tokenizer, rebuilt from its merge table without a model hub.

The merge table is OpenAI CLIP's (MIT license, see `data/NOTICE.md`). It determines the vocabulary: 256 bytes, the same 256 with an end-of-word mark,
one entry per merge, and two special tokens: 49,408 in total.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BOS_TOKEN_ID = 49406
EOS_TOKEN_ID = 49407
VOCAB_LENGTH = 49408


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes, in GPT-2's order: printable Latin-1 first, then the rest shifted past U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden_count = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(hidden_count)]


@cache
def read_merges() -> tuple[tuple[str, str], ...]:
    """The 48,894 merges in order of rank."""
    packed = (resources.files(__package__) / "data" / "clip_bpe_merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    return tuple((left, right) for left, right in (line.split() for line in lines))


def build_vocab() -> dict[str, int]:
    """Token text -> id, 49,408 entries."""
    alphabet = byte_alphabet()
    tokens = alphabet + [char + "</w>" for char in alphabet]
    tokens += ["".join(pair) for pair in read_merges()]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}


def build_clip_tokenizer(*, pad_token_id: int = EOS_TOKEN_ID) -> CLIPTokenizer:
    """A transformers CLIPTokenizer with the published vocabulary.

    `pad_token_id` is the end token for CLIP-L and 0 ("!") for OpenCLIP H and bigG.
    """
    from transformers import CLIPTokenizer  # heavy: imported when text is first encoded

    vocab = build_vocab()
    pad_token = next(token for token, index in vocab.items() if index == pad_token_id)
    return CLIPTokenizer(vocab=vocab, merges=list(read_merges()), pad_token=pad_token, model_max_length=77)


def tokenize_plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text of any length, without start and end tokens."""
    ids: list[list[int]] = tokenizer(list(texts), truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
