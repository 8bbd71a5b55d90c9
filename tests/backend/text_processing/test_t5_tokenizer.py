from __future__ import annotations

import pytest

from backend.text_processing.clip_tokenizer import tokenize_plain
from backend.text_processing.t5_tokenizer import VOCAB_LENGTH, read_vocabulary
from tests.support.t5_encoders import t5_tokenizer

# Ids from T5's published tokenizer.json, read by the library tokenizers.
PUBLISHED_PROMPTS = {
    "a photo of a cat": [3, 9, 1202, 13, 3, 9, 1712, 1],
    "A Cat, sitting.  on\n\ta mat!": [71, 3431, 6, 3823, 5, 30, 3, 9, 6928, 55, 1],
    "1girl, (masterpiece:1.2)": [209, 18722, 6, 41, 7429, 8424, 10, 10917, 61, 1],
    "": [1],
    "\uff46\uff55\uff4c\uff4c width \u2460 \xc9 \ufb01 \u65e5\u672c\u8a9e": [423, 9400, 209, 7983, 361, 3, 2, 1],
    "don't stop \u2014 \u201cquotes\u201d \u2026 \xbd": [278, 31, 17, 1190, 3, 318, 105, 8270, 15, 7, 153, 3, 233, 209, 2, 357, 1],
    "<extra_id_7> </s>": [32092, 1, 1],
    "anime_style, blue_eyes, 85mm f/1.4": [21705, 834, 4084, 6, 1692, 834, 13370, 7, 6, 11989, 635, 3, 89, 87, 14912, 1],
}


@pytest.mark.parametrize("text", PUBLISHED_PROMPTS)
def test_token_ids_are_the_published_ones(text: str) -> None:
    assert t5_tokenizer()(text)["input_ids"] == PUBLISHED_PROMPTS[text]


def test_vocabulary_has_its_published_size_and_corners() -> None:
    vocab = t5_tokenizer().get_vocab()
    assert (len(vocab), len(read_vocabulary().pieces)) == (VOCAB_LENGTH, 32000)
    assert [vocab[piece] for piece in ("<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_99>")] == [0, 1, 2, 32099, 32000]


def test_long_and_empty_texts_are_read_completely() -> None:
    assert [len(ids) for ids in tokenize_plain(t5_tokenizer(), ["cat " * 900, "", " "])] == [900, 0, 0]
