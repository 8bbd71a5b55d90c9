from __future__ import annotations

import numpy as np
from PIL import Image

from modules.pictures.masking import drop_background, expand_crop_region, fill, get_crop_region, get_crop_region_v2


def mask_with(box: tuple[int, int, int, int], size: tuple[int, int] = (100, 60)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def test_the_crop_region_is_the_mask_with_padding_inside_the_picture() -> None:
    mask = mask_with((10, 20, 30, 40))
    assert get_crop_region_v2(mask) == (10, 20, 30, 40)
    assert get_crop_region_v2(mask, 5) == (5, 15, 35, 45)
    assert get_crop_region_v2(mask, 50) == (0, 0, 80, 60)
    assert get_crop_region(mask, 5) == (5, 15, 35, 45)


def test_an_empty_mask_has_no_region() -> None:
    assert get_crop_region_v2(Image.new("L", (10, 10))) is None
    assert get_crop_region(Image.new("L", (10, 10))) == (10, 10, 0, 0)


def test_the_region_takes_the_shape_of_the_processed_size() -> None:
    assert expand_crop_region((10, 20, 30, 40), 512, 512, 100, 60) == (10, 20, 30, 40)
    assert expand_crop_region((10, 20, 50, 40), 512, 512, 100, 60) == (10, 10, 50, 50)
    assert expand_crop_region((40, 10, 50, 50), 512, 512, 100, 60) == (25, 10, 65, 50)


def test_a_grown_region_stays_inside_the_picture() -> None:
    assert expand_crop_region((90, 10, 100, 50), 512, 512, 100, 60) == (60, 10, 100, 50)
    assert expand_crop_region((0, 10, 5, 50), 512, 512, 100, 60) == (0, 10, 40, 50)
    x1, y1, x2, y2 = expand_crop_region((0, 0, 100, 60), 512, 1024, 100, 60)
    assert (x1, x2) == (0, 100)
    assert (y1, y2) == (0, 60)


def test_filling_keeps_what_is_not_masked_and_continues_it() -> None:
    image = Image.new("RGB", (64, 64), (200, 40, 40))
    image.paste((0, 0, 255), (16, 16, 48, 48))
    filled = np.asarray(fill(image, mask_with((16, 16, 48, 48), (64, 64))))
    assert np.array_equal(filled[:16], np.asarray(image)[:16])
    assert np.abs(filled[16:48, 16:48].astype(int) - np.array([200, 40, 40])).max() <= 1


def test_filling_follows_a_gradient() -> None:
    ramp = np.repeat(np.linspace(0, 255, 64)[None, :, None], 64, axis=0).repeat(3, axis=2).astype(np.uint8)
    filled = np.asarray(fill(Image.fromarray(ramp), mask_with((24, 24, 40, 40), (64, 64)))).astype(int)
    assert np.abs(filled - ramp).max() < 64
    assert filled[32, 25, 0] < filled[32, 38, 0]


def test_filling_a_wholly_masked_picture_gives_a_picture() -> None:
    assert fill(Image.new("RGB", (7, 5), "red"), Image.new("L", (7, 5), 255)).size == (7, 5)


def test_a_ground_that_is_not_quite_black_is_no_mask() -> None:
    """As in JPEG files."""
    mask = mask_with((10, 20, 30, 40)).point(lambda value: max(value, 3))
    assert get_crop_region_v2(mask) == (0, 0, 100, 60)
    assert get_crop_region_v2(drop_background(mask)) == (10, 20, 30, 40)


def test_filling_takes_a_mask_of_another_size() -> None:
    filled = fill(Image.new("RGB", (20, 12), (10, 20, 30)), mask_with((50, 0, 100, 60)))
    assert np.array_equal(np.asarray(filled), np.asarray(Image.new("RGB", (20, 12), (10, 20, 30))))
