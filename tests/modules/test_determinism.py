"""The same request gives the same picture, whatever else is made with it: bit by bit at batch size 1, within a few levels of 255 in a batch.

A batch uses other kernels than a single picture (sums in another order), so fp32 results differ in their last digits. But a picture must
never depend on the seed, noise or prompt of its neighbors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from modules.application import Application, install
from tests.support.narrow_application import KnownPictures, gradient, img2img, narrow_application, pixels, run, txt2img

BATCH_TOLERANCE_LEVELS = 2
SAMPLERS = ["Euler a", "DPM2 a", "DPM++ SDE", "DPM++ 2M SDE", "DDPM", "LCM", "UniPC"]
SEEDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "variation": {"subseed": 50, "subseed_strength": 0.4},
    "seed resize": {"seed_resize_from_w": 48, "seed_resize_from_h": 96},
    "variation and resize": {"subseed": 50, "subseed_strength": 0.4, "seed_resize_from_w": 96, "seed_resize_from_h": 48},
    "ENSD": {"override_settings": {"eta_noise_seed_delta": 31337}},
    "CPU noise": {"override_settings": {"randn_source": "CPU"}},
    "NV noise": {"override_settings": {"randn_source": "NV"}},
    "churn": {"sampler_name": "Euler", "s_churn": 5.0, "s_noise": 1.01},
}


@pytest.fixture(scope="module")
def shared_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(tmp_path_factory.mktemp("narrow"), is_shallow=True) as (app, _):
        app.options.samples_save = app.options.grid_save = app.options.return_grid = False
        yield app


@pytest.fixture(autouse=True)
def app(shared_app: Application) -> Application:
    install(shared_app)
    return shared_app


@pytest.fixture(scope="module")
def known(shared_app: Application) -> KnownPictures:
    """Pictures made alone."""
    return KnownPictures()


def pictures(request: Any) -> list[np.ndarray]:
    return [pixels(image) for image in run(request).images]


def seeds_of(place: int, fields: dict[str, Any]) -> dict[str, Any]:
    """The single picture for a position in a batch that starts at seed 7: with variations the second seed counts up, else the first."""
    return {"seed": 7, "subseed": fields["subseed"] + place} if fields.get("subseed_strength") else {"seed": 7 + place}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_again_is_the_same_bit_for_bit(sampler: str) -> None:
    """A different request in between has no effect."""
    first = pictures(txt2img(sampler_name=sampler, seed=5))
    pictures(img2img(sampler_name="Euler a", seed=6, prompt="(something:1.4) [else|other]", batch_size=2, denoising_strength=0.4))
    again = pictures(txt2img(sampler_name=sampler, seed=5))
    assert np.array_equal(first[0], again[0])


@pytest.mark.parametrize("name", SEEDED)
def test_the_place_in_a_job_does_not_matter_bit_for_bit(name: str, known: KnownPictures) -> None:
    """Batch size 1, consecutive batches, against each picture alone."""
    fields = {"sampler_name": "Euler a", **SEEDED[name]}
    row = pictures(txt2img(**{**fields, "seed": 7, "n_iter": 2}))
    for place, picture in enumerate(row):
        assert np.array_equal(picture, known.txt2img(**{**fields, **seeds_of(place, fields)}))
    assert not np.array_equal(row[0], row[1])


@pytest.mark.parametrize("name", SEEDED)
def test_the_place_in_a_batch_does_not_matter(name: str, known: KnownPictures) -> None:
    fields = {"sampler_name": "Euler a", **SEEDED[name]}
    batch = pictures(txt2img(**{**fields, "seed": 7, "batch_size": 3}))
    for place in (0, 2):
        alone = known.txt2img(**{**fields, **seeds_of(place, fields)})
        assert np.abs(batch[place] - alone).max() <= BATCH_TOLERANCE_LEVELS
        assert np.abs(batch[place] - batch[1]).max() > 4 * BATCH_TOLERANCE_LEVELS


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_kind_of_sampler_keeps_batches_apart(sampler: str) -> None:
    batch = pictures(txt2img(sampler_name=sampler, seed=7, batch_size=3, steps=5))
    alone = pictures(txt2img(sampler_name=sampler, seed=9, steps=5))[0]
    assert np.abs(batch[2] - alone).max() <= BATCH_TOLERANCE_LEVELS
    assert np.abs(batch[0] - alone).max() > 4 * BATCH_TOLERANCE_LEVELS


def test_neighbours_with_other_prompts_do_not_matter() -> None:
    """Lengths of one and two chunks, weights, a schedule and a composition in one batch."""
    prompts = ["a red cat", "word " * 90, "a (blue:1.4) [cat:dog:2]", "a AND b :0.5"]
    batch = pictures(txt2img(prompt=prompts, seed=[3, 4, 5, 6], batch_size=4))
    for place, prompt in enumerate(prompts):
        alone = pictures(txt2img(prompt=prompt, seed=3 + place))[0]
        assert np.abs(batch[place] - alone).max() <= BATCH_TOLERANCE_LEVELS, prompt


@pytest.mark.parametrize(
    "fields", [{}, {"mask": gradient(64, 64).convert("L"), "inpainting_fill": 2, "mask_blur": 0}], ids=["img2img", "latent noise"]
)
def test_img2img_and_inpainting_too(fields: dict[str, Any]) -> None:
    common = {"sampler_name": "Euler a", "denoising_strength": 0.8, **fields}
    row = pictures(img2img(**common, seed=7, n_iter=2))
    batch = pictures(img2img(**common, seed=7, batch_size=2))
    assert np.array_equal(row[0], pictures(img2img(**common, seed=7))[0])
    alone = pictures(img2img(**common, seed=8))[0]
    assert np.abs(batch[1] - alone).max() <= BATCH_TOLERANCE_LEVELS
    assert np.array_equal(row[1], alone)


def test_hires_fix_too() -> None:
    fields = {"sampler_name": "Euler a", "enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7, "hr_cfg": 4.0}
    row, batch = pictures(txt2img(**fields, seed=7, n_iter=2)), pictures(txt2img(**fields, seed=7, batch_size=2))
    alone = pictures(txt2img(**fields, seed=8))[0]
    assert np.array_equal(row[1], alone)
    assert np.abs(batch[1] - alone).max() <= BATCH_TOLERANCE_LEVELS
