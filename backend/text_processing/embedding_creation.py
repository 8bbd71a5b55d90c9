"""Creates a textual-inversion embedding: vectors initialized from the words of a text, as a starting point for training programs.

Shapes: L vectors, C channels of a text encoder. Must not know requests or pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backend.text_processing.clip_tokenizer import tokenize_plain
from backend.text_processing.embedding import EmbeddingError
from backend.unfinished_files import creating, replacing

if TYPE_CHECKING:
    from backend.text_processing.classic_engine import ClassicTextProcessingEngine

MAX_VECTORS = 75
_KEPT_SIGNS = "._- "
_MAX_NAME_BYTES = 200


def clean_name(name: str) -> str:
    """`name` as a file name: letters, digits and `._- ` only. Raises: EmbeddingError if nothing is left or it is too long."""
    kept = "".join(char for char in name if char.isalnum() or char in _KEPT_SIGNS).strip()
    if not kept.strip("._- "):
        raise EmbeddingError(f"{name!r} cannot name an embedding; use letters and digits")
    if len(kept.encode()) > _MAX_NAME_BYTES:
        raise EmbeddingError(f"{kept[:40]!r}... ({len(kept):,} letters) is too long for a file name; use at most {_MAX_NAME_BYTES} letters")
    return kept


def first_vectors(text_engines: Sequence[ClassicTextProcessingEngine], num_vectors: int, init_text: str) -> dict[str, Tensor]:
    """(L, C) by text encoder: the token vectors of `init_text`, spread over `num_vectors`; zeros if the text is empty."""
    return {engine.embedding_key: _spread(_token_vectors(engine, init_text or "*"), num_vectors, fill=bool(init_text)) for engine in text_engines}


def _token_vectors(engine: ClassicTextProcessingEngine, text: str) -> Tensor:
    tokens = tokenize_plain(engine.tokenizer, [text])[0][: engine.chunk_length] or [engine.id_end]
    encoder: Any = engine.text_encoder
    weight_VC: Tensor = encoder.get_input_embeddings().weight
    return weight_VC.detach()[torch.tensor(tokens, device=weight_VC.device)].to("cpu", torch.float32)


def _spread(words_LC: Tensor, num_vectors: int, *, fill: bool) -> Tensor:
    if not fill:
        return torch.zeros(num_vectors, words_LC.shape[1])
    return words_LC[torch.arange(num_vectors) * len(words_LC) // num_vectors].clone()


def write_embedding(
    folder: Path, name: str, tables: Mapping[str, Tensor], *, overwrite: bool, sd_checkpoint: str | None, sd_checkpoint_name: str | None
) -> Path:
    """Write a new file atomically: `.pt` in A1111's format for one text encoder, `.safetensors` for a pair (SDXL).

    Raises: EmbeddingError if the file exists, or another writer creates it meanwhile, and `overwrite` is not set.
    """
    name = clean_name(name)
    path = folder / f"{name}{'.pt' if len(tables) == 1 else '.safetensors'}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (replacing if overwrite else creating)(path) as unfinished:
            if path.exists() and not overwrite:
                raise FileExistsError(path)
            _save_tables(unfinished, name, tables, {"sd_checkpoint": sd_checkpoint, "sd_checkpoint_name": sd_checkpoint_name})
    except FileExistsError as error:
        remedy = "choose another name, or request that it be overwritten"
        raise EmbeddingError(f"there is already an embedding {path.name}; {remedy}") from error
    return path


def _save_tables(path: Path, name: str, tables: Mapping[str, Tensor], checkpoint: Mapping[str, str | None]) -> None:
    if len(tables) == 1:
        facts = {"name": name, "step": 0, **checkpoint}
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": next(iter(tables.values()))}, **facts}, path)
        return
    from safetensors.torch import save_file  # only when something is saved

    save_file({key: table.contiguous() for key, table in tables.items()}, path)
