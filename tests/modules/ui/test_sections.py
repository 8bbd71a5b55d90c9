from __future__ import annotations

import json

import gradio as gr
import pytest

from modules.ui import sections
from modules.ui.paste import PasteTarget, control_updates
from modules.ui.sections import Choices, Defaults

CHOICES = Choices(
    samplers=["Euler a", "DPM++ 2M"], schedulers=["Automatic", "Karras"], upscalers=["Latent", "Lanczos"], checkpoints=["m"], modules=["v"]
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((512, 640, 2.0, 0, 0), (1024, 1280)),
        ((512, 768, 2.0, 1024, 0), (1024, 1536)),
        ((512, 768, 2.0, 0, 1536), (1024, 1536)),
        ((512, 512, 2.0, 640, 896), (640, 896)),
        ((100, 100, 1.55, 0, 0), (155, 155)),
    ],
)
def test_size_after_hires_fix(arguments: tuple[int, int, float, int, int], expected: tuple[int, int]) -> None:
    assert sections.hires_size(*arguments) == expected


def test_size_text_of_the_accordion() -> None:
    assert sections.hires_size_html(False, 64, 64, 2, 0, 0) == ""
    assert sections.hires_size_html(True, 64, 72, 2, 0, 0) == "from <b>64x72</b> to <b>128x144</b>"


@pytest.mark.parametrize(
    ("info", "index", "expected"),
    [
        ({"all_seeds": [5, 6, 7], "index_of_first_image": 1}, 2, 6),
        ({"all_seeds": [5, 6, 7], "index_of_first_image": 1}, 0, 5),
        ({"all_seeds": [5, 6, 7]}, 9, 5),
        ({"all_seeds": []}, 0, -1),
        ({}, 0, -1),
    ],
)
def test_seed_of_a_picture_counts_without_the_grid(info: dict[str, object], index: int, expected: int) -> None:
    assert sections.seed_of(json.dumps(info), "all_seeds", index) == expected


def test_variation_seeds_are_read_from_their_own_list() -> None:
    assert sections.seed_of(json.dumps({"all_seeds": [1], "all_subseeds": [2]}), "all_subseeds", 0) == 2


def test_ranges_and_labels_are_those_users_know() -> None:
    with gr.Blocks(analytics_enabled=False):
        sampler = sections.create_sampler_section("txt2img", CHOICES, Defaults())
        size = sections.create_size_section("txt2img", Defaults(width_px=64, height_px=72))
        batch = sections.create_batch_section("txt2img")
        cfg = sections.create_cfg_section("txt2img", Defaults())
        seed = sections.create_seed_section("txt2img", gr.Textbox())
        hires = sections.create_hires_section(CHOICES, Defaults(), size)
    sliders = {
        sampler.steps: ("Sampling steps", 1, 150, 1, 20),
        size.width: ("Width", 64, 2048, 8, 64),
        size.height: ("Height", 64, 2048, 8, 72),
        batch.count: ("Batch count", 1, 100, 1, 1),
        batch.size: ("Batch size", 1, 8, 1, 1),
        cfg.scale: ("CFG Scale", 1, 30, 0.1, 7),
        seed.subseed_strength: ("Variation strength", 0, 1, 0.01, 0),
        hires.scale: ("Upscale by", 1, 4, 0.05, 2),
        hires.denoising_strength: ("Denoising strength", 0, 1, 0.01, 0.7),
        hires.steps: ("Hires steps", 0, 150, 1, 0),
    }
    for slider, expected in sliders.items():
        assert (slider.label, slider.minimum, slider.maximum, slider.step, slider.value) == expected
    assert sampler.sampler.elem_id == "txt2img_sampling"
    assert (seed.seed.value, seed.subseed.value) == (-1, -1)
    assert hires.upscaler.value == "Latent"
    assert hires.checkpoint.value == "Use same checkpoint"
    assert hires.modules.value == ["Use same choices"]


def test_a_pasted_refiner_opens_its_accordion_and_fills_it() -> None:
    with gr.Blocks(analytics_enabled=False):
        refiner = sections.create_refiner_section("txt2img", CHOICES, lambda: ["m", "n"])
        target = PasteTarget(tab="txt2img", controls=refiner.inputs(), extra_seeds=gr.Checkbox(), override_settings=gr.Dropdown())
    params = {"Refiner": "other [0123456789]", "Refiner switch at": "0.7"}
    assert [update["value"] for update in control_updates(target, params)] == [True, "other [0123456789]", 0.7]
    assert all(update.get("value") is None for update in control_updates(target, {"Steps": "3"}))
