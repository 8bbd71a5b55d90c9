"""The embeddings a model can use: finds them in folders, keeps them by name, recognizes them in a prompt's tokens.

Must not know file formats (`embedding_files`) or chunks (`chunks`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.model_folders import find_files
from backend.text_processing.clip_tokenizer import tokenize_plain
from backend.text_processing.embedding import Embedding, EmbeddingError
from backend.text_processing.embedding_files import PICTURE_SUFFIXES, TENSOR_SUFFIXES, read_embedding

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _ReadFile:
    stamp: tuple[int, int]
    embedding: Embedding | None
    reason: str | None = None


class EmbeddingDatabase:
    """`widths`: channels of each of the model's text encoders, {"clip_l": 768} or {"clip_l": 768, "clip_g": 1280}.

    `word_embeddings` are ready for use; `skipped_embeddings` are for other models; `skip_reasons` says why, including for unreadable files.
    """

    def __init__(self, tokenizer: Any, widths: Mapping[str, int]) -> None:
        self.tokenizer = tokenizer
        self.widths = dict(widths)
        self.embedding_dirs: list[Path] = []
        self.word_embeddings: dict[str, Embedding] = {}
        self.skipped_embeddings: dict[str, Embedding] = {}
        self.skip_reasons: dict[str, str] = {}
        self._registered: dict[str, Embedding] = {}
        self._bundled: dict[str, Embedding] = {}
        self._files: dict[Path, _ReadFile] = {}
        self._by_first_token: dict[int, list[tuple[list[int], Embedding]]] = {}

    def add_embedding_dir(self, path: str | Path) -> None:
        """Add a folder to search, including subfolders, from the next load on. If two files have the same name, the first folder wins."""
        if Path(path) not in self.embedding_dirs:
            self.embedding_dirs.append(Path(path))

    def clear_embedding_dirs(self) -> None:
        self.embedding_dirs.clear()

    def register_embedding(self, embedding: Embedding) -> None:
        """Make an embedding without a file usable under its name.

        Raises:
            EmbeddingError: it is for another kind of model.
        """
        self._registered[embedding.name] = embedding.fitted(self.widths)
        self._rebuild()

    def use_bundled(self, embeddings: Mapping[str, Embedding]) -> list[str]:
        """Set the embeddings bundled with files that a job uses (LoRA). They take precedence by name. Returns why some cannot be used."""
        fitted, reasons = {}, []
        for name, embedding in embeddings.items():
            try:
                fitted[name] = embedding.fitted(self.widths)
            except EmbeddingError as error:
                reasons.append(f"embedding {name[:100]}: {error}")
        facts = [{name: one.hash for name, one in table.items()} for table in (fitted, self._bundled)]
        if facts[0] != facts[1]:
            self._bundled = fitted
            self._rebuild()
        return reasons

    def load_textual_inversion_embeddings(self, force_reload: bool = False) -> None:
        """Update the database from the folders. Unchanged files are not read again unless `force_reload`."""
        found = {path: _stamp(path) for folder in self.embedding_dirs for path in _walk_files(folder)}
        known = {} if force_reload else self._files
        if found == {path: read.stamp for path, read in known.items()}:
            return
        self._files = {path: known[path] if path in known and known[path].stamp == stamp else _read(path, stamp) for path, stamp in found.items()}
        self._rebuild()
        log.info("Textual inversion: %d embeddings loaded, %d skipped.", len(self.word_embeddings), len(self.skip_reasons))

    def find_embedding_at_position(self, tokens: Sequence[int], offset: int) -> tuple[Embedding | None, int]:
        """(embedding, number of tokens in its name) if a known name begins at `offset`, else (None, 0). The longest name wins."""
        for name_tokens, embedding in self._by_first_token.get(tokens[offset], ()):
            if list(tokens[offset : offset + len(name_tokens)]) == name_tokens:
                return embedding, len(name_tokens)
        return None, 0

    @property
    def fingerprint(self) -> str:
        """A digest that changes whenever a usable embedding changes. Cached conditions depend on it."""
        lines = [f"{name}\0{embedding.hash or id(embedding)}" for name, embedding in sorted(self.word_embeddings.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _rebuild(self) -> None:
        self.word_embeddings, self.skipped_embeddings, self.skip_reasons = dict(self._registered), {}, {}
        for path, read in self._files.items():
            if read.embedding is None and read.reason:
                self._skip(path.stem, path, read.reason)
            elif read.embedding is not None:
                self._add(path, read.embedding)
        self.word_embeddings.update(self._bundled)
        self._index_names()

    def _add(self, path: Path, embedding: Embedding) -> None:
        if embedding.name in self.word_embeddings:
            self._skip(str(path), path, f"the name {embedding.name} is taken by {self.word_embeddings[embedding.name].filename}")
            return
        try:
            self.word_embeddings[embedding.name] = embedding.fitted(self.widths)
        except EmbeddingError as error:
            self.skipped_embeddings[embedding.name] = embedding
            self._skip(embedding.name, path, str(error))

    def _skip(self, name: str, path: Path, reason: str) -> None:
        self.skip_reasons[name] = reason
        log.info("Embedding %s was skipped: %s.", path.name, reason)

    def _index_names(self) -> None:
        self._by_first_token = {}
        names = list(self.word_embeddings)
        for name, name_tokens in zip(names, tokenize_plain(self.tokenizer, names) if names else []):
            if name_tokens:
                self._by_first_token.setdefault(name_tokens[0], []).append((name_tokens, self.word_embeddings[name]))
        for entries in self._by_first_token.values():
            entries.sort(key=lambda entry: len(entry[0]), reverse=True)


def _read(path: Path, stamp: tuple[int, int]) -> _ReadFile:
    try:
        return _ReadFile(stamp, read_embedding(path))
    except EmbeddingError as error:
        return _ReadFile(stamp, None, str(error))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)


def _walk_files(folder: Path) -> Iterator[Path]:
    """Embedding files below a folder, sorted by name; none if the folder does not exist."""
    return (path for path in find_files(folder, TENSOR_SUFFIXES | PICTURE_SUFFIXES) if _stamp(path)[1] > 0)
