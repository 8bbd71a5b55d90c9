from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modules.pictures import resizing
from modules.pictures.resizing import MAX_BETWEEN_PX, fix_image, flatten, resize_by_mode, resize_to, to_8_bit
from modules.pictures.upscaler import LANCZOS, builtin_upscalers, find_upscaler


def halves(width: int = 40, height: int = 20) -> Image.Image:
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


@given(st.sampled_from([0, 1, 2]), *[st.integers(1, 90) for _ in range(4)])
def test_every_mode_gives_exactly_the_size_asked_for(mode: int, width: int, height: int, goal_width: int, goal_height: int) -> None:
    assert resize_by_mode(mode, halves(width, height), goal_width, goal_height).size == (goal_width, goal_height)


def test_just_resize_stretches() -> None:
    assert np.array_equal(np.asarray(resize_by_mode(0, halves(), 20, 20)), np.asarray(halves().resize((20, 20), LANCZOS)))


def test_crop_keeps_the_shape_and_cuts_evenly() -> None:
    result = resize_by_mode(1, halves(40, 20), 20, 20)
    assert np.array_equal(np.asarray(result), np.asarray(halves(40, 20).crop((10, 0, 30, 20))))


def test_fill_keeps_the_whole_picture_and_continues_its_edges() -> None:
    source = halves(40, 20)
    pixels = np.asarray(resize_by_mode(2, source, 40, 60))
    assert np.array_equal(pixels[20:40], np.asarray(source))
    assert np.array_equal(pixels[:20], np.repeat(np.asarray(source)[:1], 20, axis=0))
    assert np.array_equal(pixels[40:], np.repeat(np.asarray(source)[-1:], 20, axis=0))
    wide = np.asarray(resize_by_mode(2, source, 80, 20))
    assert (wide[:, :20] == (255, 0, 0)).all()
    assert (wide[:, 60:] == (0, 0, 255)).all()


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (3, 60_000)])
def test_a_strip_is_cut_before_it_is_enlarged(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, **named: made.append(to[0] * to[1]) or plain(self, to, **named))
    strip = Image.new("RGB", size, "red")
    for mode in (0, 1, 2):
        assert resize_by_mode(mode, strip, 2048, 2048, find_upscaler("nearest", builtin_upscalers())).size == (2048, 2048)
    assert max(made) <= MAX_BETWEEN_PX


def test_a_strip_shows_the_middle_as_a_small_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (200, 20, 3), dtype=np.uint8))
    expected = np.asarray(resize_by_mode(1, picture, 40, 40)).astype(int)
    monkeypatch.setattr(resizing, "MAX_BETWEEN_PX", 100)
    found = np.asarray(resize_by_mode(1, picture, 40, 40)).astype(int)
    assert np.abs(found - expected).mean() < 1


def test_an_unknown_mode_says_which_there_are() -> None:
    with pytest.raises(ValueError, match="Use 0 "):
        resize_by_mode(7, halves(), 8, 8)


def test_upscaler_is_used_only_to_enlarge() -> None:
    nearest = find_upscaler("nearest", builtin_upscalers())
    enlarged = resize_to(halves(4, 2), 8, 4, nearest)
    assert np.array_equal(np.asarray(enlarged), np.asarray(halves(4, 2)).repeat(2, 0).repeat(2, 1))
    assert np.array_equal(np.asarray(resize_to(halves(), 20, 10, nearest)), np.asarray(halves().resize((20, 10), LANCZOS)))


def test_flatten_and_fix() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    flat = flatten(image, "#00ff00")
    assert flat.mode == "RGB"
    assert [flat.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (0, 255, 0)]
    palette = Image.new("P", (1, 1))
    palette.info["transparency"] = 0
    fixed = fix_image(palette)
    assert fixed is not None
    assert fixed.mode == "RGBA"
    turned = halves(40, 20)
    turned.getexif()[0x0112] = 6
    upright = fix_image(turned)
    assert upright is not None
    assert upright.size == (20, 40)
    assert fix_image(None) is None


GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("PNG", GREYS.astype(np.uint16) * 257),
        ("TIFF", GREYS.astype(np.uint16) * 257),
        ("TIFF", GREYS.astype(">u2") * 257),
        ("TIFF", GREYS.astype(np.int32) * 257),
        ("TIFF", (GREYS / 255).astype(np.float32)),
        ("PPM", GREYS.astype(np.uint16) * 257),
    ],
)
def test_deep_greys_of_files_are_scaled(kind: str, values: Any) -> None:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    with Image.open(file) as image:
        fixed = fix_image(image)
        flat = flatten(image, "#ffffff")
    assert fixed is not None
    assert fixed.mode == "L"
    assert np.array_equal(np.asarray(fixed), GREYS)
    assert np.array_equal(np.asarray(flat)[..., 0], GREYS)


def test_one_grey_of_sixteen_bits_may_be_transparent() -> None:
    image = Image.fromarray(np.array([[0, 40000, 65535]], dtype=np.uint16))
    image.info["transparency"] = 40000
    fixed = fix_image(image)
    assert fixed is not None
    assert fixed.mode == "RGBA"
    assert list(fixed.getchannel("A").tobytes()) == [255, 0, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 128, 255], dtype=np.int64), [0, 128, 255]),
        (np.array([0, 32896, 65535], dtype=np.uint16), [0, 128, 255]),
        (np.array([0, 32896, 65535], dtype=np.int32), [0, 128, 255]),
        (np.array([0.0, 0.5, 1.0, np.nan]), [0, 128, 255, 0]),
        (np.array([0.0, 100.0, 255.0]), [0, 100, 255]),
        (np.array([True, False]), [255, 0]),
    ],
)
def test_values_of_every_type_become_eight_bits(values: Any, expected: list[int]) -> None:
    assert to_8_bit(values).tolist() == expected
