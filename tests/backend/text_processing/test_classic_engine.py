"""The engine against transformers' encoder, called directly, and diffusers' `encode_prompt`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from backend.text_processing.chunks import PromptTooLongError
from backend.text_processing.classic_engine import MAX_CHUNKS, ClassicTextProcessingEngine
from backend.text_processing.embedding import Embedding
from backend.text_processing.textual_inversion import EmbeddingDatabase
from tests.support.text_encoders import NUM_LAYERS, WIDTH, encoder, tokenizer

PROMPT = "a photo of an astronaut riding a horse on mars"
PROMPTS = [PROMPT, "", "red, green"]


def sd1_engine(**changes: Any) -> ClassicTextProcessingEngine:
    return ClassicTextProcessingEngine(encoder(), tokenizer(), embedding_expected_shape=WIDTH, **changes)


def bigg_engine(**changes: Any) -> ClassicTextProcessingEngine:
    settings = {"text_projection": True, "return_pooled": True, "minimal_clip_skip": 2, "final_layer_norm": False, "embedding_key": "clip_g"}
    return ClassicTextProcessingEngine(encoder(projection=True), tokenizer(0), embedding_expected_shape=WIDTH, **(settings | changes))


def padded_ids(prompts: list[str], pad: int = 49407) -> torch.Tensor:
    return tokenizer(pad)(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def test_plain_prompts_equal_the_encoder_s_own_output() -> None:
    with torch.no_grad():
        expected = encoder()(padded_ids(PROMPTS)).last_hidden_state
    assert torch.equal(sd1_engine()(PROMPTS), expected)


def test_more_parts_than_memory_has_room_for_are_refused_before_anything_is_encoded() -> None:
    with pytest.raises(PromptTooLongError, match=rf"it has {MAX_CHUNKS + 1} parts of 75 tokens, but the limit is {MAX_CHUNKS}"):
        sd1_engine()(["a", "BREAK " * (MAX_CHUNKS + 1)])


def test_plain_prompts_equal_diffusers_sd1() -> None:
    pipe = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
    _give(pipe, text_encoder=encoder(), tokenizer=tokenizer())
    expected, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, negative_prompt="a cat")
    assert torch.equal(sd1_engine()([PROMPT]), expected)
    assert torch.equal(sd1_engine()(["a cat"]), negative)


def test_clip_skip_equals_diffusers() -> None:
    """Diffusers counts the skipped layers, A1111 the layer read: 3 here is 2 there.

    The encoder has a projection, since this diffusers looks for the final layer norm where transformers 5 has it only in such encoders.
    """
    pipe = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
    _give(pipe, text_encoder=encoder(projection=True), tokenizer=tokenizer())
    engine = ClassicTextProcessingEngine(encoder(projection=True), tokenizer())
    plain = engine([PROMPT])
    engine.set_clip_skip(3)
    expected, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False, clip_skip=2)
    assert torch.equal(engine([PROMPT]), expected)
    assert not torch.equal(expected, plain)


def test_plain_prompts_equal_diffusers_sdxl() -> None:
    pipe = StableDiffusionXLPipeline.__new__(StableDiffusionXLPipeline)
    small = encoder(seed=5)
    _give(pipe, text_encoder=small, text_encoder_2=encoder(projection=True), tokenizer=tokenizer(), tokenizer_2=tokenizer(0))
    expected, _, expected_pooled, _ = pipe.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    clip_l = ClassicTextProcessingEngine(small, tokenizer(), minimal_clip_skip=2, final_layer_norm=False)
    z_g, pooled = bigg_engine()([PROMPT])
    assert torch.equal(torch.cat([clip_l([PROMPT]), z_g], dim=-1), expected)
    torch.testing.assert_close(pooled, expected_pooled)


def test_sdxl_clip_skip_never_goes_below_the_family_s_minimum() -> None:
    engine = bigg_engine()
    one, two, three = ([engine.set_clip_skip(skip), engine([PROMPT])][1] for skip in (1, 2, 3))
    assert torch.equal(one[0], two[0])
    assert not torch.equal(two[0], three[0])
    assert torch.equal(two[1], three[1])  # the pooled vector does not change


def test_a_clip_skip_beyond_the_layers_reads_the_first_layer() -> None:
    deepest, beyond = sd1_engine(clip_skip=NUM_LAYERS), sd1_engine(clip_skip=12)
    assert torch.equal(deepest([PROMPT]), beyond([PROMPT]))


def test_pooled_comes_from_the_last_layer_s_end_token_and_is_projected() -> None:
    model = encoder(projection=True)
    with torch.no_grad():
        hidden = model.text_model(padded_ids([PROMPT], pad=0)).last_hidden_state
        expected = model.text_projection(hidden[:, 11])
    torch.testing.assert_close(bigg_engine()([PROMPT])[1], expected)
    torch.testing.assert_close(bigg_engine(text_projection=False)([PROMPT])[1], hidden[:, 11])


def test_openclip_pads_with_zero() -> None:
    """With the end token as padding the output would differ."""
    assert not torch.equal(bigg_engine()(["a cat"])[0], bigg_engine(pad_token_id=49407)(["a cat"])[0])


def test_a_long_prompt_is_its_chunks_in_a_row() -> None:
    words = [f"cat{'s' * (i % 2)}" for i in range(100)]
    ids = tokenizer()(" ".join(words), add_special_tokens=False)["input_ids"]
    rows = torch.tensor([[49406, *ids[:75], 49407], [49406, *ids[75:], *[49407] * (151 - len(ids))]])
    with torch.no_grad():
        expected = torch.cat(list(encoder()(rows).last_hidden_state)).unsqueeze(0)
    torch.testing.assert_close(sd1_engine()([" ".join(words)]), expected)


def test_break_starts_a_chunk_and_pooled_stays_with_the_first() -> None:
    z, pooled = bigg_engine()(["a cat BREAK a dog"])
    (first, second) = (bigg_engine()([text]) for text in ("a cat", "a dog"))
    assert torch.equal(z, torch.cat([first[0], second[0]], dim=1))
    assert torch.equal(pooled, first[1])


def test_prompts_of_one_call_are_padded_to_the_longest() -> None:
    z = sd1_engine()(["a cat", "word " * 80])
    assert z.shape == (2, 154, WIDTH)
    torch.testing.assert_close(z[:1, 77:], sd1_engine()([""]))


def test_weights_scale_the_tokens_they_were_given_to() -> None:
    engine = sd1_engine(emphasis_name="No norm")
    plain, weighted = engine(["a red cat"]), engine(["a (red:1.5) cat"])
    torch.testing.assert_close(weighted[0, 2], plain[0, 2] * 1.5)
    rest = [i for i in range(77) if i != 2]
    assert torch.equal(weighted[0, rest], plain[0, rest])


def test_emphasis_mode_is_the_caller_s() -> None:
    engine = sd1_engine()
    modes = {}
    for name in ("Original", "No norm", "Ignore", "None"):
        engine.set_emphasis(name)
        modes[name] = engine(["a (red:1.5) cat"])
    plain, literal = engine(["a red cat"]), encoder()(padded_ids(["a (red:1.5) cat"])).last_hidden_state.detach()
    assert torch.equal(modes["Ignore"], plain)
    assert torch.equal(modes["None"], literal)
    torch.testing.assert_close(modes["Original"], modes["No norm"] * (plain.mean() / modes["No norm"].mean()))


def test_weighted_chunks_keep_their_means_one_by_one() -> None:
    z = sd1_engine()(["a (cat:1.6) BREAK a dog"])
    assert torch.equal(z[:, 77:], sd1_engine()(["a dog"]))


def test_comma_backtrack_is_a_setting() -> None:
    prompt = "word " * 70 + ", one two three four five six"
    ids = [[chunk.tokens[1:5] for chunk in sd1_engine(comma_padding_backtrack=n).tokenize_line(prompt)[0]][1] for n in (20, 0)]
    assert ids[0][0] == tokenizer()("one")["input_ids"][1]
    assert ids[1][0] != ids[0][0]


def test_counts_and_limits() -> None:
    engine = sd1_engine()
    texts = ["", "a cat", "word " * 75, "word " * 76, "a BREAK b", "((cat:1.3))"]
    assert [engine.get_prompt_lengths(text) for text in texts] == [(0, 75), (2, 75), (75, 75), (76, 150), (76, 150), (1, 75)]


def test_an_end_token_typed_into_a_prompt_ends_it_without_harm() -> None:
    assert bigg_engine()(["a <|endoftext|> cat"])[0].shape == (1, 77, WIDTH)


def test_a_half_precision_encoder_gives_float32() -> None:
    half = encoder.__wrapped__(seed=3).to(torch.bfloat16)
    engine = ClassicTextProcessingEngine(half, tokenizer())
    assert engine(["a (cat:1.2)"]).dtype == torch.float32


# textual inversion


def database(tokens: int = 2, name: str = "mystyle", **widths: int) -> EmbeddingDatabase:
    widths = widths or {"clip_l": WIDTH}
    result = EmbeddingDatabase(tokenizer(), widths)
    generator = torch.Generator().manual_seed(9)
    tables = {key: torch.randn(tokens, width, generator=generator) for key, width in widths.items()}
    result.register_embedding(Embedding(name=name, vectors_by_encoder=tables, hash="0123456789abcdef"))
    return result


def test_vectors_replace_the_name() -> None:
    """Reference: the same rows written into a copy of the embedding table under unused tokens."""
    known = database()
    patched = encoder.__wrapped__(seed=77)
    with torch.no_grad():
        patched.load_state_dict(encoder().state_dict())
        patched.embeddings.token_embedding.weight[[100, 101]] = known.word_embeddings["mystyle"].vectors_for("clip_l")
        rows = torch.tensor([[49406, 320, 100, 101, 2368, *[49407] * 72]])
        expected = patched(rows).last_hidden_state
    assert torch.equal(sd1_engine(embeddings=known)(["a MyStyle cat"]), expected)


def test_injection_leaves_no_trace() -> None:
    engine = sd1_engine(embeddings=database())
    before = engine(["a cat"])
    engine(["mystyle"])
    assert torch.equal(engine(["a cat"]), before)
    assert len(encoder().embeddings.token_embedding._forward_hooks) == 0


def test_injection_is_undone_when_the_encoder_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = sd1_engine(embeddings=database())

    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(encoder().encoder, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine(["mystyle"])
    assert len(encoder().embeddings.token_embedding._forward_hooks) == 0


def test_each_encoder_gets_its_own_vectors() -> None:
    known = database(clip_l=WIDTH, clip_g=WIDTH)
    swapped = EmbeddingDatabase(tokenizer(), {"clip_l": WIDTH, "clip_g": WIDTH})
    tables = dict(known.word_embeddings["mystyle"].vectors_by_encoder)
    swapped.register_embedding(Embedding(name="mystyle", vectors_by_encoder={"clip_l": torch.zeros(2, WIDTH), "clip_g": tables["clip_g"]}))
    prompt = ["a mystyle cat"]
    assert torch.equal(bigg_engine(embeddings=known)(prompt)[0], bigg_engine(embeddings=swapped)(prompt)[0])
    assert not torch.equal(sd1_engine(embeddings=known)(prompt), sd1_engine(embeddings=swapped)(prompt))


def test_a_weighted_embedding_scales_all_its_vectors() -> None:
    engine = sd1_engine(embeddings=database(), emphasis_name="No norm")
    plain, weighted = engine(["a mystyle cat"]), engine(["a (mystyle:0.5) cat"])
    torch.testing.assert_close(weighted[0, 2:4], plain[0, 2:4] * 0.5)
    assert torch.equal(weighted[0, 4:], plain[0, 4:])


def test_an_embedding_longer_than_a_chunk_is_cut() -> None:
    assert sd1_engine(embeddings=database(tokens=90))(["a mystyle cat"]).shape == (1, 3 * 77, WIDTH)


def test_generation_params_are_reported_once() -> None:
    engine = sd1_engine(embeddings=database(name="my:style"), emphasis_name="No norm")
    engine(["a my:style cat", "(a dog)"])
    engine([""])
    assert engine.take_generation_params() == {"TI hashes": "mystyle: 0123456789ab", "TI": "mystyle", "Emphasis": "No norm"}
    assert engine.take_generation_params() == {}
    sd1_engine()(["(a dog)"])
    assert engine.take_generation_params() == {}


def test_embeddings_come_from_a_folder(tmp_path: Any) -> None:
    torch.save({"mystyle": torch.ones(3, WIDTH)}, tmp_path / "mystyle.pt")
    engine = sd1_engine(embedding_dir=tmp_path)
    assert engine.get_prompt_lengths("a mystyle cat") == (5, 75)


def _give(pipe: Any, **parts: Any) -> None:
    """Set the parts that `encode_prompt` reads on a pipeline without the other parts."""
    for name, value in parts.items():
        object.__setattr__(pipe, name, value)
    from diffusers.configuration_utils import FrozenDict

    object.__setattr__(pipe, "_internal_dict", FrozenDict({"force_zeros_for_empty_prompt": True}))
