from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modules.application import Application, install
from modules.errors import RequestError
from modules.processing import Processed
from modules.samplers.common import setup_img2img_steps
from tests.support.applications import installed_application
from tests.support.narrow_application import gradient, img2img, narrow_application, pixels, run, txt2img


@pytest.fixture(scope="module")
def shared_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(tmp_path_factory.mktemp("narrow"), is_shallow=True) as (app, _):
        app.options.samples_save = False
        app.options.grid_save = False
        yield app


@pytest.fixture
def app(shared_app: Application) -> Application:
    install(shared_app)
    return shared_app


def picture(result: Processed, index: int = 0) -> np.ndarray:
    return pixels(result.images[result.index_of_first_image + index])


def right_half(width: int = 64, height: int = 64) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def spot(width: int = 128, height: int = 96) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (48, 32, 80, 56))
    return mask


# Strength and steps


def test_a_higher_strength_goes_farther_from_the_picture(app: Application) -> None:
    start = pixels(gradient(64, 64))
    base = picture(run(img2img(denoising_strength=0.0)))
    distances = [np.abs(picture(run(img2img(denoising_strength=strength, steps=8))) - base).mean() for strength in (0.0, 0.4, 1.0)]
    assert distances[0] < distances[1] < distances[2]
    assert base.shape == start.shape


@pytest.mark.parametrize(
    ("strength", "fixed", "steps", "expected"),
    [
        (0.75, False, None, (20, 15)),
        (1.0, False, None, (20, 19)),
        (0.0, False, None, (20, 0)),
        (0.5, True, None, (40, 19)),
        (0.5, False, 10, (20, 9)),
        (1.0, True, None, (20, 19)),
        (0.0, False, 10, (10, 0)),
    ],
)
def test_how_many_steps_are_done(app: Application, strength: float, fixed: bool, steps: int | None, expected: tuple[int, int]) -> None:
    p = img2img(steps=20, denoising_strength=strength, override_settings={"img2img_fix_steps": fixed})
    assert setup_img2img_steps(p, steps) == expected


def test_noise_multiplier_and_extra_noise_act_and_are_noted(app: Application) -> None:
    base = picture(run(img2img()))
    multiplied = run(img2img(initial_noise_multiplier=1.3))
    assert not np.array_equal(picture(multiplied), base)
    assert "Noise multiplier: 1.3" in multiplied.infotexts[0]
    extra = run(img2img(override_settings={"img2img_extra_noise": 0.2}))
    assert not np.array_equal(picture(extra), base)
    assert "Extra noise: 0.2" in extra.infotexts[0]


def test_the_infotext_names_the_strength(app: Application) -> None:
    assert "Denoising strength: 0.6" in run(img2img(denoising_strength=0.6)).infotexts[0]


# Sizes


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_every_resize_mode_gives_the_size_that_was_asked_for(app: Application, mode: int) -> None:
    result = run(img2img(init_images=[gradient(80, 40)], resize_mode=mode, denoising_strength=0.2, steps=2))
    assert result.images[0].size == (64, 64)


def test_resize_modes_differ(app: Application) -> None:
    results = [picture(run(img2img(init_images=[gradient(80, 40)], resize_mode=mode, denoising_strength=0.0))) for mode in range(4)]
    assert len({result.tobytes() for result in results}) == 4


def test_transparency_is_laid_over_the_background_colour(app: Application) -> None:
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    white, green = (
        picture(run(img2img(init_images=[clear], denoising_strength=0.0, override_settings={"img2img_background_color": color})))
        for color in ("#ffffff", "#00ff00")
    )
    assert not np.array_equal(white, green)


def test_a_batch_starts_from_one_picture_or_from_one_each(app: Application) -> None:
    one = run(img2img(batch_size=2, denoising_strength=0.0))
    assert np.abs(picture(one, 0) - picture(one, 1)).mean() < 5
    two = run(img2img(batch_size=2, denoising_strength=0.0, init_images=[gradient(64, 64), gradient(64, 64).rotate(90)]))
    assert np.abs(picture(two, 0) - picture(two, 1)).mean() > 10


@pytest.mark.parametrize("images", [None, []])
def test_without_a_picture_it_says_so(app: Application, images: Any) -> None:
    with pytest.raises(RequestError, match="init_images"):
        run(img2img(init_images=images))


def test_pictures_that_do_not_fit_the_batch_are_refused(app: Application) -> None:
    with pytest.raises(RequestError, match="2 init_images"):
        run(img2img(init_images=[gradient(64, 64)] * 2, batch_size=3))


# Masks


def test_what_is_not_masked_stays_bit_for_bit(app: Application) -> None:
    start = pixels(gradient(64, 64))
    result = picture(run(img2img(mask=right_half(), mask_blur=0, inpaint_full_res=False, denoising_strength=1.0, steps=6)))
    assert np.array_equal(result[:, :32], start[:, :32])
    assert np.abs(result[:, 32:] - start[:, 32:]).mean() > 10


def test_an_inverted_mask_keeps_the_other_half(app: Application) -> None:
    start = pixels(gradient(64, 64))
    result = run(img2img(mask=right_half(), mask_blur=0, inpaint_full_res=False, inpainting_mask_invert=1, denoising_strength=1.0))
    assert np.array_equal(picture(result)[:, 32:], start[:, 32:])
    assert "Mask mode: Inpaint not masked" in result.infotexts[0]


def test_only_masked_works_on_the_region_and_pastes_it_back(app: Application) -> None:
    big = gradient(128, 96)
    mask = spot()
    result = run(img2img(init_images=[big], mask=mask, mask_blur=0, inpaint_full_res=True, inpaint_full_res_padding=8, denoising_strength=1.0))
    pixels_after, start = picture(result), pixels(big)
    assert result.images[0].size == (128, 96)
    kept = np.asarray(mask) == 0
    assert np.array_equal(pixels_after[kept], start[kept])
    assert np.abs(pixels_after[~kept] - start[~kept]).mean() > 10
    assert "Inpaint area: Only masked" in result.infotexts[0]
    assert "Masked area padding: 8" in result.infotexts[0]


def test_whole_picture_and_only_masked_differ(app: Application) -> None:
    fields = {"init_images": [gradient(128, 96)], "mask": spot(), "denoising_strength": 0.8, "width": 128, "height": 96}
    whole, region = run(img2img(**fields, inpaint_full_res=False)), run(img2img(**fields, inpaint_full_res=True))
    assert whole.images[0].size == region.images[0].size == (128, 96)
    assert not np.array_equal(picture(whole), picture(region))


def test_a_blurred_mask_blends(app: Application) -> None:
    start = pixels(gradient(64, 64))
    hard = picture(run(img2img(mask=right_half(), mask_blur=0, inpaint_full_res=False)))
    soft = run(img2img(mask=right_half(), mask_blur=8, inpaint_full_res=False))
    assert not np.array_equal(picture(soft), hard)
    assert np.array_equal(picture(soft)[:, :4], start[:, :4])
    assert "Mask blur: 8" in soft.infotexts[0]


@pytest.mark.parametrize(("fill", "name"), [(0, "fill"), (1, None), (2, "latent noise"), (3, "latent nothing")])
def test_every_kind_of_masked_content(app: Application, fill: int, name: str | None) -> None:
    start = pixels(gradient(64, 64))
    fields = {"mask": right_half(), "mask_blur": 0, "inpaint_full_res": False, "denoising_strength": 0.5}
    result = run(img2img(**fields, inpainting_fill=fill))
    assert np.array_equal(picture(result)[:, :32], start[:, :32])
    assert (f"Masked content: {name}" in result.infotexts[0]) == (name is not None)
    if fill != 1:
        assert not np.array_equal(picture(result), picture(run(img2img(**fields, inpainting_fill=1))))


@pytest.mark.parametrize("full_res", [True, False])
def test_an_empty_mask_leaves_the_picture_as_it_is(app: Application, full_res: bool) -> None:
    result = run(img2img(mask=Image.new("L", (64, 64), 0), inpaint_full_res=full_res, denoising_strength=1.0))
    assert np.array_equal(picture(result), pixels(gradient(64, 64)))
    assert bool(result.comments) == full_res


def test_a_soft_mask_is_rounded_for_the_latents_unless_asked(app: Application) -> None:
    """Its grays stay for pasting back in either case, as in Forge."""
    gray = Image.new("L", (64, 64), 100)
    rounded, soft = (img2img(mask=gray, mask_blur=0, inpaint_full_res=False, mask_round=hard) for hard in (True, False))
    pictures = [picture(run(request)) for request in (rounded, soft)]
    assert (float(rounded.nmask.max()), float(soft.nmask.max())) == (0.0, pytest.approx(100 / 255))
    assert not np.array_equal(*pictures)


def test_a_mask_saved_as_jpeg_works_on_its_region_only(app: Application) -> None:
    grounded = spot().point(lambda value: max(value, 3))
    fields = {"init_images": [gradient(128, 96)], "mask_blur": 4, "inpaint_full_res_padding": 8}
    with_ground, clean = img2img(mask=grounded, **fields), img2img(mask=spot(), **fields)
    assert np.array_equal(picture(run(with_ground)), picture(run(clean)))
    assert with_ground.paste_to == clean.paste_to != (0, 0, 128, 96)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("fill", [0, 1, 2, 3])
def test_a_picture_of_another_size_is_inpainted_in_every_mode(app: Application, mode: int, fill: int) -> None:
    fields = {"init_images": [gradient(96, 80)], "mask": right_half(96, 80), "mask_blur": 0, "inpaint_full_res": False}
    assert run(img2img(**fields, resize_mode=mode, inpainting_fill=fill, steps=1)).images[0].size == (64, 64)


@pytest.mark.parametrize("full_res", [False, True])
@pytest.mark.parametrize("size", [(128, 96), (64, 64), (31, 200)])
def test_a_latent_mask_may_have_any_size(app: Application, size: tuple[int, int], full_res: bool) -> None:
    fields = {"init_images": [gradient(128, 96)], "mask": spot(), "inpaint_full_res": full_res, "inpainting_fill": 0}
    request = img2img(**fields, latent_mask=right_half(*size), steps=1)
    assert run(request).images[0].size == ((128, 96) if full_res else (64, 64))
    whole = img2img(**fields, latent_mask=Image.new("L", size, 255), steps=1)
    run(whole)
    assert bool((whole.nmask == 1).all())


@pytest.mark.parametrize("depth", ["16 bit", "float"])
def test_deep_greys_are_scaled_not_cut_to_white(app: Application, depth: str) -> None:
    grey = np.linspace(0, 255, 64 * 64).round().reshape(64, 64)
    deep = Image.fromarray((grey * 257).astype(np.uint16)) if depth == "16 bit" else Image.fromarray((grey / 255).astype(np.float32))
    plain = Image.fromarray(grey.astype(np.uint8))
    for name in ("init_images", "mask"):
        given = [{name: [one] if name == "init_images" else one, "inpaint_full_res": False, "steps": 1} for one in (deep, plain)]
        assert np.array_equal(*(picture(run(img2img(**fields))) for fields in given))


@pytest.fixture
def demo_app(tmp_path: Path) -> Iterator[Application]:
    """Uses the demo checkpoint: at this size narrow ones have group norms over one value, which torch rejects."""
    folder = tmp_path / "models" / "Stable-diffusion"
    folder.mkdir(parents=True)
    (folder / "demo.safetensors").symlink_to(next((Path(__file__).parents[3] / "models" / "Stable-diffusion").glob("demo-*.safetensors")))
    with installed_application(tmp_path) as app:
        app.options.live_previews_enable = app.options.samples_save = app.options.grid_save = False
        yield app


@pytest.mark.usefixtures("demo_app")
@pytest.mark.parametrize("tiling", [False, True])
def test_pictures_of_eight_pixels_have_latents_of_one_and_need_no_conditioning(tiling: bool) -> None:
    assert run(img2img(width=8, height=8, tiling=tiling, steps=1)).images[0].size == (8, 8)
    first = txt2img(width=8, height=8, tiling=tiling, steps=1, enable_hr=True, hr_scale=1.0, hr_upscaler="Latent")
    assert run(first).images[0].size == (8, 8)


def test_the_mask_can_be_of_another_size(app: Application) -> None:
    result = run(img2img(init_images=[gradient(64, 64)], mask=right_half(256, 256), mask_blur=0, inpaint_full_res=False))
    assert np.array_equal(picture(result)[:, :28], pixels(gradient(64, 64))[:, :28])


def test_mask_and_masked_part_are_returned_where_the_settings_ask(app: Application) -> None:
    overrides = {"return_mask": True, "return_mask_composite": True}
    result = run(img2img(mask=right_half(), mask_blur=0, inpaint_full_res=False, override_settings=overrides))
    mask, part = result.extra_images
    assert np.array_equal(np.asarray(mask.convert("L")), np.asarray(right_half()))
    assert part.mode == "RGBA"
    assert np.asarray(part)[0, 0, 3] == 0


def test_colours_are_matched_where_the_setting_asks(app: Application) -> None:
    warm = Image.new("RGB", (64, 64), (220, 120, 40))
    plain, matched = (
        picture(run(img2img(init_images=[warm], denoising_strength=1.0, override_settings={"img2img_color_correction": on}))) for on in (False, True)
    )
    assert not np.array_equal(plain, matched)


def test_the_initial_picture_is_saved_under_its_hash(app: Application, tmp_path: Path) -> None:
    overrides = {"save_init_img": True, "outdir_init_images": str(tmp_path)}
    result = run(img2img(override_settings=overrides))
    saved = list(tmp_path.rglob("*.png"))
    assert len(saved) == 1
    assert f"Init image hash: {saved[0].stem}" in result.infotexts[0]
