"""Splits tokens into chunks of 75: handles BREAK, keeps phrases together at commas, and makes room for textual-inversion vectors.

A text encoder reads 77 positions: a start token, 75 tokens, an end token. Longer prompts are encoded chunk by chunk. Must not know text; knows only
the number of vectors of embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from backend.text_processing.embedding import Embedding


class PromptTooLongError(ValueError):
    """A prompt has too many tokens or parts to encode; the message says how many and what to do."""


class PromptChunkFix(NamedTuple):
    """`embedding` replaces the token embeddings from `offset` on, not counting the start token."""

    offset: int
    embedding: Embedding


@dataclass(slots=True)
class PromptChunk:
    """One window of the text encoder. It is complete with `chunk_length + 2` tokens, including the start and end token."""

    tokens: list[int] = field(default_factory=list)
    multipliers: list[float] = field(default_factory=list)
    fixes: list[PromptChunkFix] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkLayout:
    """`comma_backtrack`: a phrase that a chunk's end would cut moves to the next chunk if its comma is at most that many tokens back; 0 cuts
    anywhere."""

    chunk_length: int
    start_token: int
    end_token: int
    comma_token: int | None
    comma_backtrack: int

    def empty_chunk(self) -> PromptChunk:
        num_places = self.chunk_length + 2
        return PromptChunk([self.start_token] + [self.end_token] * (num_places - 1), [1.0] * num_places)

    def complete(self, chunk: PromptChunk) -> PromptChunk:
        """The chunk with its start token, padded to full length with end tokens."""
        num_missing = self.chunk_length - len(chunk.tokens)
        tokens = [self.start_token, *chunk.tokens, *[self.end_token] * (num_missing + 1)]
        return PromptChunk(tokens, [1.0, *chunk.multipliers, *[1.0] * (num_missing + 1)], chunk.fixes)


class ChunkBuilder:
    """Takes tokens one by one; `finish` returns the chunks. Use it once."""

    def __init__(self, layout: ChunkLayout) -> None:
        self.layout = layout
        self.chunks: list[PromptChunk] = []
        self._open = PromptChunk()
        self._last_comma: int | None = None

    def add_token(self, token: int, weight: float) -> None:
        self.make_room_for(token)
        self._open.tokens.append(token)
        self._open.multipliers.append(weight)

    def add_embedding(self, first_token: int, embedding: Embedding, weight: float) -> None:
        """Add an embedding's vectors, all in one chunk. Vectors beyond a chunk's length are dropped."""
        self.make_room_for(first_token)
        num_vectors = min(embedding.vectors, self.layout.chunk_length)
        if len(self._open.tokens) + num_vectors > self.layout.chunk_length:
            self.next_chunk()
        self._open.fixes.append(PromptChunkFix(len(self._open.tokens), embedding))
        self._open.tokens += [0] * num_vectors
        self._open.multipliers += [weight] * num_vectors

    def make_room_for(self, token: int) -> None:
        """Start a new chunk if this one is full, and move what follows a nearby comma into it."""
        position = len(self._open.tokens)
        if token == self.layout.comma_token:
            self._last_comma = position
        elif position == self.layout.chunk_length and self._comma_is_near():
            self._move_phrase_on()
        if len(self._open.tokens) == self.layout.chunk_length:
            self.next_chunk()

    def next_chunk(self) -> None:
        self.chunks.append(self.layout.complete(self._open))
        self._open = PromptChunk()
        self._last_comma = None

    def finish(self) -> tuple[list[PromptChunk], int]:
        """(chunks, token count), with at least one chunk. Every chunk except the last counts as full, because nothing more fits in it."""
        num_tokens = len(self.chunks) * self.layout.chunk_length + len(self._open.tokens)
        if self._open.tokens or not self.chunks:
            self.next_chunk()
        return self.chunks, num_tokens

    def _comma_is_near(self) -> bool:
        return self._last_comma is not None and len(self._open.tokens) - self._last_comma <= self.layout.comma_backtrack

    def _move_phrase_on(self) -> None:
        assert self._last_comma is not None
        cut, whole = self._last_comma + 1, self._open
        self._open = PromptChunk(whole.tokens[:cut], whole.multipliers[:cut], [fix for fix in whole.fixes if fix.offset < cut])
        self.next_chunk()
        moved_fixes = [PromptChunkFix(fix.offset - cut, fix.embedding) for fix in whole.fixes if fix.offset >= cut]
        self._open = PromptChunk(whole.tokens[cut:], whole.multipliers[cut:], moved_fixes)
