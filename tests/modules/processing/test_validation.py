from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modules import application
from modules.application import Application, build_application
from modules.errors import OptionError, RequestError, UnknownSamplerError
from modules.launch.cmd_args import config_for_tests
from modules.processing.request import StableDiffusionProcessingImg2Img, StableDiffusionProcessingTxt2Img
from modules.processing.validation import fix_seed, get_fixed_seed, set_all_seeds, validate_request


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    app = build_application(config_for_tests(tmp_path))
    application.install(app)
    yield app
    app.close()
    application.install(None)


def txt2img(app: Application, **fields: Any) -> StableDiffusionProcessingTxt2Img:
    p = StableDiffusionProcessingTxt2Img(**{"prompt": "a", "seed": 1, **fields})
    validate_request(p, app)
    return p


@pytest.mark.parametrize(
    "fields",
    [
        {"width": -512},
        {"width": 0},
        {"height": 7},
        {"width": 10**9},
        {"width": 16384, "height": 16384},
        {"width": "wide"},
        {"width": 512.5},
        {"width": True},
        {"width": None},
        {"steps": 0},
        {"steps": -3},
        {"steps": 10**6},
        {"steps": 3.5},
        {"steps": math.nan},
        {"cfg_scale": math.nan},
        {"cfg_scale": math.inf},
        {"cfg_scale": "high"},
        {"cfg_scale": [7]},
        {"batch_size": 0},
        {"batch_size": 10**6},
        {"n_iter": -1},
        {"n_iter": 10**7},
        {"denoising_strength": 1.5},
        {"denoising_strength": -0.1},
        {"subseed_strength": 2},
        {"s_churn": -1},
        {"s_churn": 10**400},
        {"steps": 10**400},
        {"width": 10**400},
        {"eta": math.nan},
        {"hr_scale": 0},
        {"hr_resize_x": -8},
        {"seed_resize_from_w": 10**9},
    ],
)
def test_numbers_that_make_no_picture_are_refused_by_name(app: Application, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as raised:
        txt2img(app, **fields)
    assert raised.value.status == 422
    assert "picture" in str(raised.value) or next(iter(fields)) in str(raised.value)


@pytest.mark.parametrize("fields", [{"mask_blur_x": -1}, {"inpainting_fill": 4}, {"resize_mode": 9}, {"inpaint_full_res_padding": -1}])
def test_numbers_of_img2img_too(app: Application, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(fields))):
        validate_request(StableDiffusionProcessingImg2Img(prompt="a", **fields), app)


def test_whole_numbers_may_come_as_floats_or_texts(app: Application) -> None:
    p = txt2img(app, width=512.0, height="256", steps=20.0, batch_size="2")
    assert (p.width, p.height, p.steps, p.batch_size) == (512, 256, 20, 2)


def test_sizes_are_cut_to_multiples_of_eight_and_it_is_said(app: Application) -> None:
    p = txt2img(app, width=517, height=512)
    assert (p.width, p.height) == (512, 512)
    assert "517" in "".join(p.comments)


def test_samplers_are_resolved_and_unknown_ones_refused(app: Application) -> None:
    p = txt2img(app, sampler_name="Euler a Karras")
    assert (p.sampler_name, p.scheduler, p.uses_ensd) == ("Euler a", "Karras", True)
    with pytest.raises(UnknownSamplerError, match="Eulr"):
        txt2img(app, sampler_name="Eulr")


def test_the_second_pass_keeps_the_schedule_of_the_first_when_only_the_sampler_is_another(app: Application) -> None:
    same = txt2img(app, sampler_name="DPM++ 2M Karras", hr_sampler_name="Use same sampler", hr_scheduler="Use same scheduler")
    assert (same.hr_sampler_name, same.hr_scheduler) == (None, None)
    other = txt2img(app, sampler_name="DPM++ 2M Karras", hr_sampler_name="Euler")
    assert (other.scheduler, other.hr_sampler_name, other.hr_scheduler) == ("Automatic", "Euler", "Karras")


def test_an_unknown_checkpoint_override_is_dropped_and_said(app: Application) -> None:
    p = txt2img(app, override_settings={"sd_model_checkpoint": "gone", "jpeg_quality": 50})
    assert p.options.jpeg_quality == 50
    assert "gone" in "".join(p.comments)
    assert "sd_model_checkpoint" not in p.override_settings


def test_wrong_override_settings_are_refused(app: Application) -> None:
    with pytest.raises(OptionError, match="jpeg_quality"):
        txt2img(app, override_settings={"jpeg_quality": "loud"})


def test_settings_are_those_of_the_moment_the_request_was_made(app: Application) -> None:
    p = StableDiffusionProcessingTxt2Img(prompt="a", override_settings={"jpeg_quality": 10})
    app.options.samples_format = "webp"
    app.options.jpeg_quality = 20
    validate_request(p, app)
    assert (p.options.samples_format, p.options.jpeg_quality) == ("png", 10)
    assert app.options.jpeg_quality == 20


def test_empty_fields_take_the_setting_of_their_name(app: Application) -> None:
    app.options.s_noise = 1.05
    p = txt2img(app, override_settings={"tiling": True})
    assert (p.s_noise, p.s_churn, p.tiling, p.restore_faces) == (1.05, 0.0, True, False)


def test_what_is_not_there_is_named(app: Application) -> None:
    p = txt2img(app, restore_faces=True)
    assert p.restore_faces is False
    assert "restore_faces" in "".join(p.comments)


@pytest.mark.parametrize(("given", "expected"), [(5, 5), ("0x10", 16), (7.0, 7), (2**64 - 1, 2**64 - 1), (0, 0)])
def test_seeds_that_are_numbers(given: Any, expected: int) -> None:
    assert get_fixed_seed(given) == expected


@pytest.mark.parametrize("given", [-1, None, "", -7])
def test_a_random_seed_is_drawn_once(given: Any) -> None:
    assert 0 <= get_fixed_seed(given) < 2**32


@pytest.mark.parametrize("given", ["abc", 2**64, "1e999", math.inf, math.nan, [1, "x"], {}])
def test_what_is_no_seed_is_refused(given: Any) -> None:
    with pytest.raises(RequestError, match="seed"):
        [get_fixed_seed(seed) for seed in given] if isinstance(given, list) else get_fixed_seed(given)


def test_seeds_count_up_with_the_pictures(app: Application) -> None:
    p = txt2img(app, seed=10, subseed=100, batch_size=3)
    p.all_prompts = ["a"] * 3
    set_all_seeds(p)
    assert (p.all_seeds, p.all_subseeds) == ([10, 11, 12], [100, 101, 102])
    p.subseed_strength = 0.5
    set_all_seeds(p)
    assert (p.all_seeds, p.all_subseeds) == ([10, 10, 10], [100, 101, 102])


def test_a_list_of_seeds_needs_one_for_each_picture(app: Application) -> None:
    p = txt2img(app, seed=[5, 9], subseed=-1)
    fix_seed(p)
    p.all_prompts = ["a", "b"]
    set_all_seeds(p)
    assert p.all_seeds == [5, 9]
    p.all_prompts = ["a", "b", "c"]
    with pytest.raises(RequestError, match="2 seeds"):
        set_all_seeds(p)


def test_mask_blur_is_one_number_for_both_directions() -> None:
    assert StableDiffusionProcessingImg2Img(mask_blur=9).mask_blur_y == 9
    p = StableDiffusionProcessingImg2Img(mask_blur_x=1, mask_blur_y=2)
    assert p.mask_blur is None
    p.mask_blur = 3
    assert (p.mask_blur_x, p.mask_blur_y) == (3, 3)
