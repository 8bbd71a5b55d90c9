from __future__ import annotations

import pytest
import torch

from backend.text_processing.chunks import ChunkBuilder, ChunkLayout, PromptChunk
from backend.text_processing.embedding import Embedding

START, END, COMMA, WORD = 900, 901, 5, 7


def layout(comma_backtrack: int = 3) -> ChunkLayout:
    return ChunkLayout(chunk_length=10, start_token=START, end_token=END, comma_token=COMMA, comma_backtrack=comma_backtrack)


def lay(tokens: list[int], comma_backtrack: int = 3) -> tuple[list[list[int]], int]:
    builder = ChunkBuilder(layout(comma_backtrack))
    for token in tokens:
        builder.add_token(token, 1.0)
    chunks, num_tokens = builder.finish()
    return [chunk.tokens for chunk in chunks], num_tokens


def embedding(num_vectors: int) -> Embedding:
    return Embedding(name="style", vectors_by_encoder={"clip_l": torch.ones(num_vectors, 4)})


def test_a_short_prompt_is_one_padded_chunk() -> None:
    assert lay([1, 2]) == ([[START, 1, 2] + [END] * 9], 2)


def test_no_tokens_are_one_empty_chunk() -> None:
    chunks, num_tokens = lay([])
    assert (chunks, num_tokens) == ([[START] + [END] * 11], 0)
    assert layout().empty_chunk().tokens == chunks[0]


@pytest.mark.parametrize(("num_tokens", "num_chunks"), [(10, 1), (11, 2), (20, 2), (21, 3)])
def test_long_prompts_take_more_chunks(num_tokens: int, num_chunks: int) -> None:
    tokens = list(range(100, 100 + num_tokens))
    chunks, counted = lay(tokens)
    assert (len(chunks), counted) == (num_chunks, num_tokens)
    assert all(len(chunk) == 12 and chunk[0] == START and chunk[-1] == END for chunk in chunks)
    assert [token for chunk in chunks for token in chunk if token < START] == tokens


def test_a_phrase_near_a_comma_moves_to_the_next_chunk_undivided() -> None:
    head, phrase = [WORD] * 7, [11, 12, 13]
    chunks, counted = lay([*head, COMMA, *phrase])
    assert chunks == [[START, *head, COMMA, END, END, END], [START, *phrase] + [END] * 8]
    assert counted == 13  # nothing more fits into the first chunk


def test_a_comma_too_far_back_or_no_backtrack_cuts_the_phrase() -> None:
    tokens = [WORD] * 6 + [COMMA, 11, 12, 13, 14]
    assert lay(tokens)[0][1][1:3] == [14, END]
    assert lay([WORD] * 7 + [COMMA, 11, 12, 13], comma_backtrack=0)[0][1][1:3] == [13, END]


def test_a_comma_that_begins_a_chunk_moves_nothing() -> None:
    chunks, counted = lay([WORD] * 10 + [COMMA, 11])
    assert (chunks[1][1:4], counted) == ([COMMA, 11, END], 12)


def test_a_comma_of_an_earlier_chunk_is_forgotten() -> None:
    chunks, _ = lay([WORD] * 9 + [COMMA] + [11] * 11)
    assert [chunk[1:11] for chunk in chunks] == [[WORD] * 9 + [COMMA], [11] * 10, [11] + [END] * 9]


def test_weights_keep_step_with_tokens() -> None:
    builder = ChunkBuilder(layout())
    for index in range(12):
        builder.add_token(COMMA if index == 8 else WORD, 1.0 + index)
    chunks, _ = builder.finish()
    assert chunks[0].multipliers == [1.0, *range(1, 10), 1.0, 1.0]
    assert chunks[1].multipliers == [1.0, 10.0, 11.0, 12.0] + [1.0] * 8


def test_vectors_stay_together() -> None:
    builder = ChunkBuilder(layout())
    for _ in range(8):
        builder.add_token(WORD, 1.0)
    builder.add_embedding(33, embedding(4), 1.5)
    chunks, counted = builder.finish()
    assert (len(chunks), counted) == (2, 14)
    assert (chunks[0].fixes, chunks[1].fixes[0].offset) == ([], 0)
    assert chunks[1].tokens == [START, 0, 0, 0, 0] + [END] * 7
    assert chunks[1].multipliers[:6] == [1.0, 1.5, 1.5, 1.5, 1.5, 1.0]


def test_vectors_of_a_moved_phrase_move_with_it() -> None:
    builder = ChunkBuilder(layout())
    for token in [WORD] * 7 + [COMMA]:
        builder.add_token(token, 1.0)
    builder.add_embedding(33, embedding(2), 1.0)
    builder.add_token(44, 1.0)
    chunks, _ = builder.finish()
    assert (chunks[0].fixes, chunks[1].fixes[0].offset) == ([], 0)
    assert chunks[1].tokens[:5] == [START, 0, 0, 44, END]


def test_more_vectors_than_places_are_cut() -> None:
    builder = ChunkBuilder(layout())
    builder.add_token(WORD, 1.0)
    builder.add_embedding(33, embedding(14), 1.0)
    chunks, _ = builder.finish()
    assert [len(chunk.tokens) for chunk in chunks] == [12, 12]
    assert chunks[1] == PromptChunk([START] + [0] * 10 + [END], [1.0] * 12, chunks[1].fixes)
