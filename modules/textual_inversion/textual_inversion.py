"""The engine's textual inversion, under the name that extensions import."""

from __future__ import annotations

from backend.text_processing.embedding import Embedding as Embedding
from backend.text_processing.embedding import EmbeddingError as EmbeddingError
from backend.text_processing.textual_inversion import EmbeddingDatabase as EmbeddingDatabase
