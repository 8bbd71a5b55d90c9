"""Qwen's tokenizer, and the engine that encodes prompts with a language model. References: published ids, transformers' Qwen3Model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backend.nn.qwen3 import Qwen3Shape, Qwen3TextEncoder, qwen3_config
from backend.text_processing.chat_engine import ChatTextProcessingEngine, Template
from backend.text_processing.chunks import PromptTooLongError
from backend.text_processing.qwen_tokenizer import VOCAB_LENGTH
from tests.support.zimage_networks import qwen3_encoder, qwen_tokenizer

PUBLISHED: dict[str, list[int]] = {
    "a photo of an astronaut riding a horse on mars": [64, 6548, 315, 458, 46633, 19837, 264, 15223, 389, 47349],
    "": [],
    "Größe, 猫と犬 12345": [6464, 78940, 11, 10236, 234, 104, 19182, 105329, 220, 16, 17, 18, 19, 20],
    "<|im_start|>user\nred cat<|im_end|>\n<|im_start|>assistant\n": [151644, 872, 198, 1151, 8251, 151645, 198, 151644, 77091, 198],
    "don't   stop\n\n\tnow 🐈": [15007, 944, 256, 2936, 271, 80922, 11162, 238, 230],
}
"""Ids that the published tokenizer.json gives (read with the tokenizers library)."""


def own_encoder() -> Any:
    source = qwen3_encoder()
    config = source.config
    shape = Qwen3Shape(
        vocab_length=config.vocab_size, width=config.hidden_size, inner_width=config.intermediate_size, num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads, head_width=config.head_dim, num_layers=config.num_hidden_layers,
    )  # fmt: skip
    encoder = Qwen3TextEncoder(qwen3_config(shape))
    encoder.load_state_dict(source.state_dict())
    return encoder.eval().requires_grad_(False)


def engine(**template: Any) -> ChatTextProcessingEngine:
    return ChatTextProcessingEngine(own_encoder(), qwen_tokenizer(), Template(**template))


@pytest.mark.parametrize("text", PUBLISHED)
def test_ids_are_the_published_ones(text: str) -> None:
    assert qwen_tokenizer()([text], add_special_tokens=False)["input_ids"][0] == PUBLISHED[text]
    assert len(qwen_tokenizer()) == VOCAB_LENGTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_are_those_before_transformers_last_layer(dtype: torch.dtype) -> None:
    ids = torch.tensor([[5, 900, 17, 1, 0, 40_000]])
    with torch.no_grad():
        wanted = qwen3_encoder()(ids, output_hidden_states=True).hidden_states[-2]
        found = own_encoder().to(dtype)(ids)
    assert found.dtype == torch.float32
    if dtype is torch.float32:
        torch.testing.assert_close(found, wanted)
    else:
        assert (found - wanted).abs().max() < (0.1 if dtype is torch.bfloat16 else 0.02) * wanted.abs().max()


def test_fp16_does_not_overflow_where_the_stream_and_the_products_do() -> None:
    encoder, ids = own_encoder(), torch.tensor([[5, 900, 17]])
    encoder.layers[0].mlp.up_proj.weight.mul_(3e3)
    encoder.layers[0].mlp.gate_proj.weight.mul_(3e3)
    wanted = encoder(ids)
    assert wanted.abs().max() > torch.finfo(torch.float16).max
    found = encoder.half()(ids)
    assert found.isfinite().all() and (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_prompts_stand_in_their_template_and_are_padded_behind() -> None:
    plain = engine(before="<|im_start|>user\n", after="<|im_end|>\n")
    features, lengths = plain(["red cat", ""])
    ids = [qwen_tokenizer()([f"<|im_start|>user\n{text}<|im_end|>\n"])["input_ids"][0] for text in ("red cat", "")]
    assert lengths.tolist() == [len(one) for one in ids]
    for row, one in enumerate(ids):
        torch.testing.assert_close(features[row, : len(one)], plain.text_encoder(torch.tensor([one]))[0])
        assert not features[row, len(one) :].any()
    dropped, shorter = engine(before="<|im_start|>user\n", after="<|im_end|>\n", num_dropped=3)(["red cat"])
    assert shorter.tolist() == [len(ids[0]) - 3]
    torch.testing.assert_close(dropped, features[:1, 3 : len(ids[0])])


def test_weights_act_and_are_told_and_parts_after_a_break_follow() -> None:
    plain = engine()
    plain.set_emphasis("No norm")
    (light, _), (heavy, _) = plain(["red cat"]), plain(["(red cat:1.5)"])
    torch.testing.assert_close(heavy, light * 1.5)
    assert plain.take_generation_params() == {"Emphasis": "No norm"} and plain.take_generation_params() == {}
    joined, lengths = plain(["red cat BREAK blue dog"])
    assert joined.shape[1] == int(lengths[0]) == plain(["red cat"])[0].shape[1] + plain(["blue dog"])[0].shape[1]
    assert plain.get_prompt_lengths("red cat") == (2, 512)
    with pytest.raises(PromptTooLongError, match=r"got \d+ tokens at once, but the limit is 4096.*BREAK"):
        plain(["red " * 5000])
