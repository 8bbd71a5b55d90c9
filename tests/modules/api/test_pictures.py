from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from modules.api.api import decode_base64_to_image, encode_pil_to_base64
from modules.api.pictures import PictureError, decode_picture
from modules.pictures.metadata import read_info_from_image
from tests.modules.api.conftest import Server, to_base64

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))
TEXT = to_base64(PICTURE)


@pytest.mark.parametrize(
    "sent",
    [
        TEXT,
        f"data:image/png;base64,{TEXT}",
        f"data:application/octet-stream;name=a.png;base64,{TEXT}",
        TEXT.rstrip("="),
        TEXT.replace("+", "-").replace("/", "_"),
        "\n".join(TEXT[start : start + 76] for start in range(0, len(TEXT), 76)),
        f"  {TEXT}\n",
    ],
)
def test_base64_as_clients_write_it(sent: str) -> None:
    assert np.array_equal(np.asarray(decode_picture(sent, "image")), np.asarray(PICTURE))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "TGA"])
def test_kinds_of_files(image_format: str) -> None:
    assert decode_picture(to_base64(PICTURE.resize((32, 32)), image_format), "image").size == (32, 32)


def test_kinds_that_pillow_hands_to_other_programs_are_not_opened() -> None:
    postscript = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n").decode()
    with pytest.raises(PictureError, match="is not a readable picture"):
        decode_picture(postscript, "image")


def test_texts_in_the_file_stay_readable() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat")
    assert read_info_from_image(decode_picture(to_base64(PICTURE, pnginfo=info), "image"))[0] == "a cat"


def test_urls_are_not_fetched_without_rules() -> None:
    with pytest.raises(PictureError, match="disabled"):
        decode_picture("https://example.org/a.png", "image")


def test_names_of_extensions(server: Server) -> None:
    image = decode_base64_to_image(TEXT)
    assert np.array_equal(np.asarray(image), np.asarray(PICTURE))
    image.info["parameters"] = "a cat"
    encoded = encode_pil_to_base64(image)
    assert isinstance(encoded, bytes)
    reopened = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert reopened.info["parameters"] == "a cat"
    server.app.options.set("samples_format", "webp")
    assert Image.open(io.BytesIO(base64.b64decode(encode_pil_to_base64(image)))).format == "WEBP"
