"""Tokenizers that GGUF files of text encoders contain, checked, for the families that use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.gguf_file import GgufFile
from backend.gguf_tokenizer import read_gguf_tokenizer
from backend.text_processing.sentencepiece_file import USER_DEFINED, SentencePieceModel


def is_gguf(file: TensorFile) -> bool:
    return isinstance(file, GgufFile)


def read_gguf_pieces(file: TensorFile, model: str, num_rows: int) -> SentencePieceModel | None:
    """The SentencePiece model ("llama" or "t5") in a GGUF file; None if it has none. Raises: CheckpointError.

    llama.cpp writes the spaces of users' pieces as spaces; they are U+2581 here, as SentencePiece has them.
    """
    found = read_gguf_tokenizer(file, model=model, num_rows=num_rows)
    if found is None:
        return None
    texts = [text.replace(" ", "\u2581") if kind == USER_DEFINED else text for text, kind in zip(found.tokens, found.kinds, strict=True)]
    return SentencePieceModel(tuple(zip(texts, found.scores, strict=True)), b"", found.kinds)


@contextmanager
def refusing_tokenizers(file: TensorFile) -> Iterator[None]:
    """A ValueError about pieces or merges that no tokenizer has becomes a CheckpointError that names the file."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{file.path.name}: its tokenizer cannot be read: {error}. The file is damaged; download it again.") from error
