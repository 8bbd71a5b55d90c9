from __future__ import annotations

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modules.infotext.stealth import add_stealth_infotext, read_info_from_image_stealth


def picture(mode: str = "RGB", width: int = 96, height: int = 64) -> Image.Image:
    channels = len(mode)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels)


def hand_written(text: str, signature: bytes, *, rgb: bool, compressed: bool) -> Image.Image:
    """The documented layout written bit by bit, independent of the tested code: columns first, alpha or red, green, blue."""
    payload = gzip.compress(text.encode()) if compressed else text.encode()
    message = signature + (len(payload) * 8).to_bytes(4, "big") + payload
    bits = iter("".join(f"{byte:08b}" for byte in message))
    image = picture("RGBA", 64, 128)
    for x in range(image.width):
        for y in range(image.height):
            pixel = list(image.getpixel((x, y)))  # type: ignore[arg-type]
            for channel in (0, 1, 2) if rgb else (3,):
                bit = next(bits, None)
                if bit is not None:
                    pixel[channel] = (pixel[channel] & 0xFE) | int(bit)
            image.putpixel((x, y), tuple(pixel))
    return image.convert("RGB") if rgb else image


@pytest.mark.parametrize(
    ("signature", "rgb", "compressed"),
    [(b"stealth_pnginfo", False, False), (b"stealth_pngcomp", False, True), (b"stealth_rgbinfo", True, False), (b"stealth_rgbcomp", True, True)],
)
def test_reads_all_four_kinds(signature: bytes, rgb: bool, compressed: bool) -> None:
    text = "a cat, ü\nSteps: 20, Seed: 1, Size: 64x64"
    assert read_info_from_image_stealth(hand_written(text, signature, rgb=rgb, compressed=compressed)) == text


@pytest.mark.parametrize("mode", ["Alpha", "RGB"])
@given(text=st.text(st.characters(codec="utf-8"), max_size=300))
def test_round_trip(mode: str, text: str) -> None:
    carrier = add_stealth_infotext(picture(), text, mode)
    assert read_info_from_image_stealth(carrier) == text


def test_alpha_mode_leaves_the_colours_as_they_are() -> None:
    image = picture()
    carrier = add_stealth_infotext(image, "text", "Alpha")
    assert np.array_equal(np.asarray(carrier)[:, :, :3], np.asarray(image))
    assert np.asarray(carrier)[:, :, 3].min() >= 254


def test_rgb_mode_changes_lowest_bits_only() -> None:
    image = picture()
    difference = np.abs(np.asarray(add_stealth_infotext(image, "text", "RGB")).astype(int) - np.asarray(image))
    assert difference.max() <= 1


def test_a_text_too_long_for_the_picture_is_refused() -> None:
    noise = np.random.default_rng(1).integers(33, 120, 400).astype(np.uint8).tobytes().decode()
    with pytest.raises(ValueError, match="does not fit"):
        add_stealth_infotext(picture(width=8, height=8), noise)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_plain_pictures_hold_nothing(mode: str) -> None:
    assert read_info_from_image_stealth(picture().convert(mode)) is None


def test_lies_about_the_length_and_bombs_are_not_believed() -> None:
    too_long = b"stealth_pnginfo" + (2**31).to_bytes(4, "big")
    bomb = gzip.compress(bytes(64 << 20))
    for message in (
        too_long,
        b"stealth_pngcomp" + (len(bomb) * 8).to_bytes(4, "big") + bomb,
        b"stealth_pngcomp" + (80).to_bytes(4, "big") + b"not a gzip",
    ):
        bits = np.unpackbits(np.frombuffer(message, np.uint8))
        height = 1024
        alpha = np.zeros((bits.size // height + 1) * height, np.uint8)
        alpha[: bits.size] = bits
        pixels = np.zeros((height, alpha.size // height, 4), np.uint8)
        pixels[:, :, 3] = alpha.reshape(-1, height).T
        assert read_info_from_image_stealth(Image.fromarray(pixels)) is None
