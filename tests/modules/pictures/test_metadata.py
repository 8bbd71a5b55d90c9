from __future__ import annotations

import io
import json

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from modules.infotext.stealth import add_stealth_infotext
from modules.pictures.metadata import decode_user_comment, image_data, read_info_from_image, user_comment_exif

TEXT = "a cat, ü 漢字\nSteps: 20, Sampler: Euler, Seed: 1, Size: 8x8"


def reopened(image: Image.Image, image_format: str, **arguments: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **arguments)
    buffer.seek(0)
    return Image.open(buffer)


def png(**chunks: str) -> Image.Image:
    info = PngImagePlugin.PngInfo()
    for key, value in chunks.items():
        info.add_text(key, value)
    return reopened(Image.new("RGB", (8, 8)), "PNG", pnginfo=info)


def test_png_chunks() -> None:
    assert read_info_from_image(png(parameters=TEXT, other="x")) == (TEXT, {"other": "x"})


def test_a_picture_without_texts() -> None:
    assert read_info_from_image(Image.new("RGB", (8, 8))) == (None, {})


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + TEXT.encode("utf-16-be"),
        b"UNICODE\0" + TEXT.encode("utf-16-le"),
        b"UNICODE\0" + TEXT.encode("utf-16"),
        b"\0" * 8 + TEXT.encode("utf-8"),
        b"ASCII\0\0\0" + TEXT.encode("utf-8"),
        TEXT.encode("utf-8"),
    ],
)
def test_user_comments_of_all_writers(comment: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    image = reopened(Image.new("RGB", (8, 8)), "JPEG", exif=exif.tobytes())
    assert read_info_from_image(image)[0] == TEXT


def test_our_user_comment_has_the_form_other_programs_read() -> None:
    exif = Image.Exif()
    exif.load(user_comment_exif("ab"))
    assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] == b"UNICODE\0\0a\0b"
    assert decode_user_comment(b"UNICODE\0\0a\0b") == "ab"


def test_gif_comment() -> None:
    assert read_info_from_image(reopened(Image.new("L", (8, 8)), "GIF", comment=TEXT))[0] == TEXT


def test_novelai() -> None:
    comment = json.dumps({"steps": 28, "sampler": "k_euler", "seed": 42, "scale": 11.0, "uc": "bad"})
    geninfo, items = read_info_from_image(png(Software="NovelAI", Description="a cat", Comment=comment))
    assert geninfo is not None
    assert geninfo.startswith("a cat\nNegative prompt: bad\nSteps: 28, Sampler: Euler, CFG scale: 11.0, Seed: 42, Size: 8x8")
    assert items["Software"] == "NovelAI"


GRAPH = {
    "1": {"inputs": {"steps": 5, "cfg": 3, "seed": 9, "sampler_name": "euler", "scheduler": "normal", "positive": ["2", 0], "negative": ["3", 0]}},
    "2": {"inputs": {"text": "a cat", "clip": ["9", 0]}},
    "3": {"inputs": {"text": "", "clip": ["9", 0]}},
}


def test_comfy_png_and_webp() -> None:
    geninfo, items = read_info_from_image(png(prompt=json.dumps(GRAPH), workflow="{}"))
    assert geninfo == "a cat\nSteps: 5, Sampler: Euler, Schedule type: Normal, CFG scale: 3, Seed: 9, Version: ComfyUI"
    assert "workflow" in items
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "workflow:{}"
    exif[ExifTags.Base.Model] = "prompt:" + json.dumps(GRAPH)
    assert read_info_from_image(reopened(Image.new("RGB", (8, 8)), "WEBP", exif=exif.tobytes()))[0] == geninfo


def test_a_comfy_picture_saved_with_parameters_keeps_those() -> None:
    assert read_info_from_image(png(prompt=json.dumps(GRAPH), parameters=TEXT))[0] == TEXT


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_files_do_not_raise() -> None:
    buffer = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", TEXT)
    Image.effect_noise((64, 64), 50).save(buffer, format="PNG", pnginfo=info)
    cut = Image.open(io.BytesIO(buffer.getvalue()[:-400]))
    assert read_info_from_image(cut)[0] == TEXT
    broken_exif = reopened(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert read_info_from_image(broken_exif)[0] is None


def test_image_data() -> None:
    buffer = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", TEXT)
    Image.new("RGB", (8, 8)).save(buffer, format="PNG", pnginfo=info)
    assert image_data(buffer.getvalue()) == (TEXT, None)
    assert image_data(b"just a text") == ("just a text", None)
    assert image_data(b"\xff\xfe\x00\x80 bytes") == ("", None)


def test_an_empty_parameters_chunk_hides_nothing() -> None:
    comment = json.dumps({"steps": 28, "sampler": "k_euler", "seed": 42, "scale": 11.0})
    geninfo, _ = read_info_from_image(png(parameters=" ", Software="NovelAI", Description="a cat", Comment=comment))
    assert geninfo is not None and geninfo.startswith("a cat\nSteps: 28")


def test_novelai_in_the_alpha_bits_is_read_as_parameters() -> None:
    chunks = json.dumps({"Description": "a cat", "Comment": json.dumps({"steps": 28, "sampler": "k_euler", "seed": 42})})
    hidden = add_stealth_infotext(Image.new("RGBA", (64, 64)), chunks)
    geninfo, _ = read_info_from_image(hidden)
    assert geninfo is not None and geninfo.startswith("a cat\nSteps: 28") and "Size: 64x64" in geninfo
