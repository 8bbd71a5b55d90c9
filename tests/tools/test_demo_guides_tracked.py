"""The tracked ControlNet and LoRA of the demo checkpoint, with the product: a small part of `evaluate-guides` (tools/demo_model/README.md)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tools.demo_model.evaluate_guides import FORMS, LORA_TAG, draw_guide_cases, draw_outline_cases, make_guided, score_guided, score_outlined
from tools.demo_model.product import DEMO_CONTROLNET, DEMO_LORA, installed_product, make_text_picture
from tools.demo_model.train_controlnet import MAX_FILE_BYTES
from tools.demo_model.train_lora import MAX_FILE_BYTES as MAX_LORA_BYTES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module", autouse=True)
def product() -> Iterator[None]:
    with installed_product(guides=(DEMO_CONTROLNET, DEMO_LORA)):
        yield


def test_shapes_follow_a_drawn_outline_and_not_the_prompt() -> None:
    assert DEMO_CONTROLNET.stat().st_size <= MAX_FILE_BYTES
    cases = draw_guide_cases(6)
    plain, guided = make_guided(cases[:2], None), make_guided(cases, FORMS[0])
    assert not any(score_guided(case, picture).follows for case, picture in zip(cases[:2], plain, strict=True))
    assert sum(score_guided(case, picture).follows for case, picture in zip(cases, guided, strict=True)) >= 5


def test_the_lora_draws_outlines() -> None:
    assert DEMO_LORA.stat().st_size <= MAX_LORA_BYTES
    cases = draw_outline_cases(4)
    for tag, wanted in (("", 0), (f" {LORA_TAG}", 3)):
        pictures = [make_text_picture(prompt + tag, seed=1 + index) for index, (_, prompt) in enumerate(cases)]
        outlined = sum(score_outlined(scene, picture).outlined for (scene, _), picture in zip(cases, pictures, strict=True))
        assert outlined >= wanted if wanted else outlined == 0
