from __future__ import annotations

import pytest

from backend.text_processing.clip_tokenizer import build_clip_tokenizer, build_vocab, read_merges, tokenize_plain

# Ids of OpenAI's published CLIP vocabulary.
PUBLISHED_PROMPTS = {
    "a photo of an astronaut riding a horse on mars": [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407],
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "a photo of a dog": [49406, 320, 1125, 539, 320, 1929, 49407],
    "hello world!": [49406, 3306, 1002, 256, 49407],
}


@pytest.mark.parametrize("text", PUBLISHED_PROMPTS)
def test_token_ids_are_the_published_ones(text: str) -> None:
    assert build_clip_tokenizer()(text)["input_ids"] == PUBLISHED_PROMPTS[text]


def test_vocabulary_has_its_published_size_and_corners() -> None:
    vocab = build_vocab()
    assert len(vocab) == 49408 == len(set(vocab.values()))
    assert len(read_merges()) == 48894
    assert (vocab["!"], vocab["!</w>"], vocab["i" + "n"], vocab["<|startoftext|>"], vocab["<|endoftext|>"]) == (0, 256, 512, 49406, 49407)
    assert vocab[",</w>"] == 267


@pytest.mark.parametrize("pad_token_id", [49407, 0])
def test_padding_is_the_family_s(pad_token_id: int) -> None:
    tokenizer = build_clip_tokenizer(pad_token_id=pad_token_id)
    ids = tokenizer("a cat", padding="max_length")["input_ids"]
    assert ids == [49406, 320, 2368, 49407] + [pad_token_id] * 73


def test_case_and_blanks_do_not_matter() -> None:
    tokenizer = build_clip_tokenizer()
    assert tokenize_plain(tokenizer, ["  A   Photo\n of  A CAT "]) == tokenize_plain(tokenizer, ["a photo of a cat"]) == [[320, 1125, 539, 320, 2368]]


def test_long_and_empty_texts_are_read_completely() -> None:
    assert [len(ids) for ids in tokenize_plain(build_clip_tokenizer(), ["cat " * 200, "", " "])] == [200, 0, 0]
