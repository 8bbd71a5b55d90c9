"""Pasting a picture's parameters reproduces it bit by bit: over HTTP, with the settings back at their defaults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from modules.api.api import create_api
from tests.modules.api.conftest import PictureMaker, Server, from_base64, info_of, to_base64
from tests.support.applications import installed_application
from tests.support.checkpoints import write_checkpoint
from tests.support.narrow_application import gradient

pytestmark = pytest.mark.slow

TEXT_REQUESTS: dict[str, dict[str, Any]] = {
    "sampler and schedule": {"sampler_name": "DPM++ 2M SDE", "scheduler": "Exponential", "cfg_scale": 5.5},
    "prompt language": {"prompt": 'a (cat:1.3) "in quotes", [day:night:0.5] AND [red|blue] :0.7\nBREAK 漢字: ü', "negative_prompt": "b, c: d\ne"},
    "variation": {"subseed": 77, "subseed_strength": 0.35, "seed_resize_from_w": 96, "seed_resize_from_h": 64},
    "clip skip, ENSD, noise": {"sampler_name": "Euler a", "override_settings": {
        "CLIP_stop_at_last_layers": 2, "eta_noise_seed_delta": 31337, "randn_source": "NV"}},
    "schedule settings": {"sampler_name": "DPM++ 2M", "scheduler": "Karras", "override_settings": {"sigma_min": 0.1, "sigma_max": 9.0, "rho": 5.0}},
    "beta": {"scheduler": "Beta", "override_settings": {"beta_dist_alpha": 0.8, "beta_dist_beta": 0.5}},
    "eta": {"sampler_name": "DDIM", "override_settings": {"eta_ddim": 0.5}},
    "eta of ancestral samplers": {"sampler_name": "Euler a", "override_settings": {"eta_ancestral": 0.6}},
    "churn": {"sampler_name": "Euler", "override_settings": {"s_churn": 8.0, "s_noise": 1.02, "s_tmin": 0.05}},
    "UniPC": {"sampler_name": "UniPC", "override_settings": {"uni_pc_variant": "bh2", "uni_pc_order": 2}},
    "UniPC's own timesteps": {"sampler_name": "UniPC", "override_settings": {"uni_pc_skip_type": "logSNR"}},
    "emphasis": {"prompt": "a (cat:1.6)", "override_settings": {"emphasis": "No norm"}},
    "tiling": {"tiling": True},
    "guidance cut short": {"override_settings": {"s_min_uncond": 2.0, "skip_early_cond": 0.3, "skip_late_cond": 0.3}},
    "penultimate sigma": {"override_settings": {"always_discard_next_to_last_sigma": True}},
    "hires fix, latent": {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent (bicubic)", "denoising_strength": 0.6, "hr_cfg": 3.0},
    "hires fix, all its own": {
        "enable_hr": True, "hr_resize_x": 96, "hr_resize_y": 128, "hr_upscaler": "Lanczos", "denoising_strength": 0.5, "hr_second_pass_steps": 5,
        "hr_sampler_name": "DPM++ 2M", "hr_scheduler": "Karras", "hr_prompt": "a dog, big", "hr_negative_prompt": "x: y", "hr_cfg": 2.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    checkpoints = folder / "models" / "Stable-diffusion"
    checkpoints.mkdir(parents=True)
    write_checkpoint(checkpoints / "narrow.safetensors", "sd15", is_shallow=True, metadata={"modelspec.resolution": "64x64"})
    with installed_application(folder, api=True) as app:
        app.options.set("stealth_pnginfo_option", "None")
        fastapi_app = FastAPI()
        create_api(app, fastapi_app)
        with TestClient(fastapi_app) as client:
            yield Server(app, client, PictureMaker(app))


def pixels(text: str) -> np.ndarray:
    return np.asarray(from_base64(text).convert("RGB"))


@pytest.mark.parametrize("case", TEXT_REQUESTS)
def test_text_to_picture(server: Server, case: str) -> None:
    fields = {"prompt": "a cat", "seed": 4, "steps": 4, "width": 64, "height": 64, "sampler_name": "Euler", "cfg_scale": 4, **TEXT_REQUESTS[case]}
    plain = {name: value for name, value in fields.items() if name not in TEXT_REQUESTS[case] or name in ("prompt", "sampler_name")}
    first = server.txt2img(**fields)
    text = info_of(first)["infotexts"][0]
    again = server.txt2img(infotext=text)
    assert np.array_equal(pixels(first["images"][0]), pixels(again["images"][0])), text
    assert info_of(again)["infotexts"][0] == text
    other = server.txt2img(**plain)  # the same request without the tested feature
    assert case == "prompt language" or not np.array_equal(pixels(first["images"][0]), pixels(other["images"][0])), "its fields change nothing"


def test_picture_to_picture(server: Server) -> None:
    """The picture and its mask are not in the text; everything else is."""
    start = {"init_images": [to_base64(gradient(64, 64))], "mask": to_base64(gradient(64, 64).convert("L"))}
    first = server.img2img(
        prompt="a cat", seed=4, steps=6, width=64, height=64, sampler_name="Euler a", cfg_scale=3, denoising_strength=0.6, mask_blur=2,
        inpaint_full_res_padding=8, inpainting_fill=0, initial_noise_multiplier=1.1, **start,
    )  # fmt: skip
    text = info_of(first)["infotexts"][0]
    again = server.img2img(infotext=text, inpainting_fill=0, **start)
    assert np.array_equal(pixels(first["images"][0]), pixels(again["images"][0])), text
