from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from modules.processing.compositing import (
    apply_color_correction,
    apply_overlay,
    blur_mask,
    create_binary_mask,
    lab_to_rgb,
    old_hires_fix_first_pass_dimensions,
    overlay_of,
    paste_box,
    rgb_to_lab,
    setup_color_correction,
)


def random_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def half_mask(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def test_only_the_mask_in_a_transparency_is_made_hard() -> None:
    """As in Forge, grays of a mask stay."""
    values = np.array([[0, 100, 200, 255]], dtype=np.uint8)
    grey, alpha = Image.fromarray(values), Image.new("RGBA", (4, 1))
    alpha.putalpha(Image.fromarray(values))
    assert list(create_binary_mask(grey).tobytes()) == [0, 100, 200, 255]
    assert list(create_binary_mask(alpha).tobytes()) == [0, 0, 255, 255]
    assert list(create_binary_mask(alpha, round=False).tobytes()) == [0, 100, 200, 255]


def test_the_mask_of_a_transparent_picture_is_its_transparency() -> None:
    picture = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    picture.putpixel((0, 0), (0, 0, 0, 0))
    assert list(create_binary_mask(picture).tobytes()) == [0, 255]


def test_blur_keeps_the_mass_and_is_separable() -> None:
    mask = Image.new("L", (41, 41), 0)
    mask.putpixel((20, 20), 255)
    blurred = np.asarray(blur_mask(mask, 2, 0)).astype(float)
    assert (blurred[:20] == 0).all()
    assert (blurred[21:] == 0).all()
    assert blurred[20].sum() == pytest.approx(255, abs=6)
    expected = 255 * np.exp(-0.5 * (np.arange(-5, 6) / 2) ** 2) / np.exp(-0.5 * (np.arange(-5, 6) / 2) ** 2).sum()
    assert np.abs(blurred[20, 15:26] - expected).max() <= 1
    assert np.array_equal(np.asarray(blur_mask(mask, 0, 0)), np.asarray(mask))


def test_what_is_not_masked_comes_back_bit_for_bit() -> None:
    original, result = random_picture(32, 16, 1), random_picture(32, 16, 2)
    composed, alone = apply_overlay(result, None, overlay_of(original, half_mask(32, 16)))
    assert np.array_equal(np.asarray(composed)[:, :16], np.asarray(original)[:, :16])
    assert np.array_equal(np.asarray(composed)[:, 16:], np.asarray(result)[:, 16:])
    assert np.array_equal(np.asarray(alone), np.asarray(result))


def test_a_crop_goes_back_to_its_place() -> None:
    original, result = random_picture(64, 48, 1), random_picture(32, 32, 2)
    mask = Image.new("L", (64, 48), 0)
    mask.paste(255, (10, 8, 26, 24))
    composed, _ = apply_overlay(result, paste_box((10, 8, 26, 24)), overlay_of(original, mask))
    pixels, expected = np.asarray(composed).copy(), np.asarray(original).copy()
    pixels[8:24, 10:26] = expected[8:24, 10:26] = 0
    assert np.array_equal(pixels, expected)
    assert not np.array_equal(np.asarray(composed), np.asarray(original))


def test_without_an_overlay_the_result_is_left_alone() -> None:
    result = random_picture(8, 8)
    assert apply_overlay(result, None, None)[0] is result


def test_known_colours_in_lab() -> None:
    """Reference values: CIE L*a*b* of the sRGB primaries under D65 (Lindbloom)."""
    pixels = np.array([[[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]]], dtype=np.uint8)
    expected = np.array([[100, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [0, 0, 0]])
    assert np.abs(rgb_to_lab(pixels)[0] - expected).max() < 0.05


def test_lab_and_back_changes_nothing() -> None:
    pixels = np.asarray(random_picture(32, 32))
    assert np.abs(lab_to_rgb(rgb_to_lab(pixels)).astype(int) - pixels).max() <= 1


def test_colours_are_matched_and_detail_is_kept() -> None:
    warm = Image.fromarray((np.asarray(random_picture(32, 32, 1)) * np.array([1.0, 0.5, 0.2])).astype(np.uint8))
    gray = random_picture(32, 32, 2).convert("L").convert("RGB")
    corrected = np.asarray(apply_color_correction(setup_color_correction(warm), gray)).astype(float)
    assert corrected[..., 0].mean() > corrected[..., 2].mean() + 20
    luminosity = corrected @ np.array([0.3, 0.59, 0.11])
    assert np.abs(luminosity - np.asarray(gray)[..., 0]).mean() < 3


def test_matching_a_picture_to_itself_changes_nothing() -> None:
    picture = random_picture(16, 16)
    corrected = np.asarray(apply_color_correction(setup_color_correction(picture), picture)).astype(int)
    assert np.abs(corrected - np.asarray(picture)).max() <= 2


@pytest.mark.parametrize(("size", "expected"), [((1024, 1024), (512, 512)), ((1024, 512), (768, 384)), ((512, 768), (448, 640))])
def test_first_pass_sizes_of_old_hires_fix(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert old_hires_fix_first_pass_dimensions(*size) == expected
