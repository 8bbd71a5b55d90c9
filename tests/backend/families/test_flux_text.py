"""Flux.1's text recipe against diffusers' own FluxPipeline on the same encoders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from backend.families.flux.text import build_text_engines, encode
from backend.text_processing.textual_inversion import EmbeddingDatabase
from tests.support.t5_encoders import t5_encoder, t5_tokenizer
from tests.support.text_encoders import WIDTH, encoder, tokenizer

PROMPTS = ["a photo of an astronaut riding a horse on mars", "", "red green " * 50]


def side() -> Any:
    engines = build_text_engines(
        {"clip_l": encoder(), "t5xxl": t5_encoder()},
        {"clip_l": tokenizer(), "t5xxl": t5_tokenizer()},
        EmbeddingDatabase(tokenizer(), {"clip_l": WIDTH}),
    )
    return SimpleNamespace(run_text_engine=lambda index, prompt: engines[index](prompt), engines=engines)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_conditions_equal_diffusers(prompt: str) -> None:
    pipe = FluxPipeline.__new__(FluxPipeline)
    for name, value in {
        "text_encoder": encoder(), "text_encoder_2": t5_encoder(), "tokenizer": tokenizer(), "tokenizer_2": t5_tokenizer(), "transformer": None,
    }.items():  # fmt: skip
        object.__setattr__(pipe, name, value) if not isinstance(value, torch.nn.Module) else pipe.__dict__.__setitem__(name, value)
    pipe.tokenizer_max_length = 77
    pipe.__dict__["_internal_dict"] = {}
    text, pooled, _ = pipe.encode_prompt(prompt, prompt, device=torch.device("cpu"), max_sequence_length=256)
    conditions = encode(side(), [prompt])
    torch.testing.assert_close(conditions["crossattn"], text)
    torch.testing.assert_close(conditions["vector"], pooled)


def test_the_counter_is_t5_s() -> None:
    assert side().engines[0].get_prompt_lengths("cat dog bird") == (3, 255)
