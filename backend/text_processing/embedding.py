"""A textual-inversion embedding: vectors that stand for a word of the prompt.

Shapes: L vectors, C channels of a text encoder. Must not know files or prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

PLAIN_KEY = ""
"""The key of vectors from a file that does not name their text encoder."""


class EmbeddingError(ValueError):
    """A file contains no embedding, or none that this model can use. The message is the reason."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embedding:
    """`vectors_by_encoder`: (L, C) float32 tensors by text encoder ("clip_l", "clip_g", ...), or a single one under `PLAIN_KEY`.

    Raises:
        EmbeddingError: there are no vectors, they are not finite (L, C) tables, or the encoders' L differ.
    """

    name: str
    vectors_by_encoder: Mapping[str, torch.Tensor]
    filename: Path | None = None
    hash: str = ""
    step: int | None = None
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None

    def __post_init__(self) -> None:
        if not self.vectors_by_encoder:
            raise EmbeddingError("it contains no vectors")
        for key, table_LC in self.vectors_by_encoder.items():
            _check_table(key, table_LC)
        lengths = {key: len(table_LC) for key, table_LC in self.vectors_by_encoder.items()}
        if len(set(lengths.values())) > 1:
            raise EmbeddingError(f"its text encoders have different numbers of vectors: {_listed(lengths)}")

    @property
    def vectors(self) -> int:
        """L: how many tokens of a prompt the embedding takes up."""
        return len(next(iter(self.vectors_by_encoder.values())))

    @property
    def widths(self) -> dict[str, int]:
        """C for each text encoder."""
        return {key: table_LC.shape[-1] for key, table_LC in self.vectors_by_encoder.items()}

    @property
    def shape(self) -> int:
        """C summed over the text encoders, as A1111 counts: 768 for SD1, 1024 for SD2, 2048 for SDXL."""
        return sum(self.widths.values())

    @property
    def shorthash(self) -> str:
        """The first 12 hex digits of the file's SHA-256."""
        return self.hash[:12]

    @property
    def vec(self) -> torch.Tensor | dict[str, torch.Tensor]:
        """Forge's view: the only table, or tables by encoder."""
        tables = dict(self.vectors_by_encoder)
        return next(iter(tables.values())) if len(tables) == 1 else tables

    def vectors_for(self, key: str) -> torch.Tensor:
        """(L, C) for the text encoder `key`."""
        return self.vectors_by_encoder[key]

    def fitted(self, widths: Mapping[str, int]) -> Embedding:
        """The same embedding for a model with the text encoders `widths` (key -> C).

        Raises:
            EmbeddingError: it was made for other text encoders.
        """
        tables = dict(self.vectors_by_encoder)
        if set(tables) == {PLAIN_KEY} and len(widths) == 1:
            tables = {next(iter(widths)): tables[PLAIN_KEY]}
        if {key: table_LC.shape[-1] for key, table_LC in tables.items()} != dict(widths):
            raise EmbeddingError(f"it was made for another kind of model: it has {_listed(self.widths)}; this model takes {_listed(widths)}")
        return Embedding(
            name=self.name,
            vectors_by_encoder=tables,
            filename=self.filename,
            hash=self.hash,
            step=self.step,
            sd_checkpoint=self.sd_checkpoint,
            sd_checkpoint_name=self.sd_checkpoint_name,
        )


def _check_table(key: str, table_LC: torch.Tensor) -> None:
    if table_LC.ndim != 2 or 0 in table_LC.shape or not table_LC.is_floating_point():
        kind = f"{str(table_LC.dtype).removeprefix('torch.')} tensor of shape {tuple(table_LC.shape)}"
        raise EmbeddingError(f"{key or 'its tensor'} is a {kind}, not a table of vectors")
    if not bool(torch.isfinite(table_LC).all()):
        raise EmbeddingError(f"{key or 'its tensor'} contains values that are not finite")


def _listed(numbers: Mapping[str, int]) -> str:
    return " + ".join(f"{key or 'vectors of width'} {number}" for key, number in numbers.items())
