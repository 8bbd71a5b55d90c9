"""The engine against transformers' encoder and tokenizer, called directly."""

from __future__ import annotations

import pytest
import torch

from backend.text_processing.chunks import PromptTooLongError
from backend.text_processing.t5_engine import MAX_LENGTH, MAX_TOTAL_LENGTH, MIN_LENGTH, T5TextProcessingEngine
from tests.support.t5_encoders import WIDTH, t5_encoder, t5_tokenizer

PROMPT = "a photo of an astronaut riding a horse on mars"


def engine(min_length: int = 24, emphasis: str = "Original") -> T5TextProcessingEngine:
    return T5TextProcessingEngine(t5_encoder(), t5_tokenizer(), emphasis, min_length)


def expected_of(text: str, length: int) -> torch.Tensor:
    ids = t5_tokenizer()(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return t5_encoder()(ids).last_hidden_state


def test_plain_prompts_equal_the_encoder_s_output_padded_to_the_least_length() -> None:
    assert torch.equal(engine()([PROMPT, "", PROMPT]), torch.cat([expected_of(text, 24) for text in (PROMPT, "", PROMPT)]))


def test_the_least_length_is_forge_s() -> None:
    assert T5TextProcessingEngine(t5_encoder(), t5_tokenizer())(["a cat"]).shape == (1, 256, WIDTH)


def test_a_long_prompt_grows_without_a_limit_at_77_or_512_and_others_are_padded_to_it() -> None:
    long = "cat " * 600
    given = engine()([long, PROMPT])
    assert given.shape == (2, 601, WIDTH)
    torch.testing.assert_close(given, torch.cat([expected_of(long, 601), expected_of(PROMPT, 601)]))


def test_a_row_does_not_depend_on_other_rows() -> None:
    assert torch.equal(engine()([PROMPT])[0], engine()(["a dog", PROMPT])[1])


def test_more_tokens_than_attention_has_memory_for_are_refused_with_both_numbers() -> None:
    with pytest.raises(PromptTooLongError, match=f"T5 got {MAX_LENGTH + 1} tokens at once, but the limit is {MAX_LENGTH}"):
        engine()(["cat " * MAX_LENGTH])
    chunks, num_tokens = engine().tokenize_line("cat " * (MAX_LENGTH - 1) + "BREAK" + " cat" * 9)
    assert (len(chunks), num_tokens) == (2, MAX_LENGTH + 8)


def test_more_breaks_than_memory_has_room_for_are_refused_before_anything_is_encoded() -> None:
    """100,000 characters of BREAK would be 4 million padded tokens."""
    most = MAX_TOTAL_LENGTH // MIN_LENGTH
    with pytest.raises(PromptTooLongError, match=rf"T5 got {most + 1} parts, padded to {(most + 1) * MIN_LENGTH} tokens, but the limit is"):
        engine()(["BREAK " * most])
    assert engine(min_length=8)(["BREAK " * 9]).shape == (1, 80, WIDTH)


def test_weights_scale_the_output_of_their_tokens() -> None:
    """ "a", "photo" and " of" are separate tokens here, so the ids are those of the plain text, and the weighted rows can be computed by hand."""
    plain, weighted = engine(emphasis="No norm")(["cat dog bird"]), engine(emphasis="No norm")(["cat (dog:1.5) bird"])
    scale = torch.ones(24, 1)
    scale[1] = 1.5
    torch.testing.assert_close(weighted[0], plain[0] * scale)
    kept_mean = engine()(["cat (dog:1.5) bird"])
    torch.testing.assert_close(kept_mean, weighted * (plain.mean() / weighted.mean()))


def test_without_emphasis_brackets_are_text() -> None:
    assert torch.equal(engine(emphasis="None")(["(cat:1.5)"]), expected_of("(cat:1.5)", 24))


def test_break_parts_are_encoded_by_themselves_and_joined() -> None:
    given = engine()(["a cat BREAK a dog", PROMPT])
    assert torch.equal(given[0], torch.cat([expected_of("a cat", 24)[0], expected_of("a dog", 24)[0]]))
    assert torch.equal(given[1], torch.cat([expected_of(PROMPT, 24)[0], expected_of("", 24)[0]]))


def test_the_counter_counts_text_and_grows_past_255() -> None:
    counting = T5TextProcessingEngine(t5_encoder(), t5_tokenizer())
    assert counting.get_prompt_lengths("cat dog bird") == (3, 255)
    assert counting.get_prompt_lengths("cat " * 300) == (300, 300)


def test_the_infotext_names_an_emphasis_mode_that_took_part() -> None:
    one = engine(emphasis="No norm")
    one(["a cat"])
    assert one.take_generation_params() == {}
    one(["a (cat:1.2)"])
    assert one.take_generation_params() == {"Emphasis": "No norm"}
    assert one.take_generation_params() == {}
