"""The tokenizer in a text encoder's GGUF file, as llama.cpp's converter writes it: tokens by id with their kinds, and scores or merges."""

from __future__ import annotations

from dataclasses import dataclass

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.gguf_file import GgufFile

_KEYS = "tokenizer.ggml."
MAX_TOKENS = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTokenizer:
    """`model`: "gpt2" (bytes and `merges`, each two symbols with a space between them), "llama" or "t5" (SentencePiece pieces with `scores`).

    `kinds`: SentencePiece's number for each token's kind.
    """

    model: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()


def read_gguf_tokenizer(file: TensorFile, *, model: str, num_rows: int) -> GgufTokenizer | None:
    """The tokenizer of an encoder whose table has `num_rows` tokens; None if the file is no GGUF file, or has no tokenizer of this model.

    Raises: CheckpointError if its lists do not fit together.
    """
    if not isinstance(file, GgufFile) or file.metadata.get(f"{_KEYS}model") != model:
        return None
    tokens = file.texts(f"{_KEYS}tokens")
    kinds, scores = (file.numbers(_KEYS + name) for name in ("token_type", "scores"))
    merges = file.texts(f"{_KEYS}merges")
    if not tokens or len(tokens) > min(num_rows, MAX_TOKENS):
        raise _refuse(file, f"{len(tokens)} tokens for a table of {num_rows}")
    if kinds and len(kinds) != len(tokens):
        raise _refuse(file, f"{len(kinds)} kinds for {len(tokens)} tokens")
    if model == "gpt2" and not merges:
        raise _refuse(file, "no merges")
    if model != "gpt2" and len(scores) != len(tokens):
        raise _refuse(file, f"{len(scores)} scores for {len(tokens)} tokens")
    return GgufTokenizer(model=model, tokens=tokens, kinds=tuple(map(int, kinds)) or (1,) * len(tokens), scores=scores, merges=merges)


def _refuse(file: TensorFile, what: str) -> CheckpointError:
    return CheckpointError(f"{file.path.name}: its tokenizer has {what}. The file is damaged; download it again, or use a .safetensors version.")
