from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from modules.pictures.metadata import read_info_from_image
from tests.modules.api.conftest import Server, from_base64, to_base64

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
TEXT = "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 16x12, Clip skip: 2"


def with_text() -> str:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", TEXT)
    info.add_text("note", "ü")
    return to_base64(PICTURE, pnginfo=info)


def enlarge(server: Server, **body: object) -> Image.Image:
    return from_base64(server.post("/sdapi/v1/extra-single-image", {"image": to_base64(PICTURE), **body})["image"])


def test_by_factor(server: Server) -> None:
    nearest = enlarge(server, upscaler_1="Nearest", upscaling_resize=2)
    assert np.array_equal(np.asarray(nearest), np.asarray(PICTURE).repeat(2, 0).repeat(2, 1))


def test_defaults_leave_the_picture_as_it_is(server: Server) -> None:
    assert np.array_equal(np.asarray(enlarge(server)), np.asarray(PICTURE))


@pytest.mark.parametrize(("crop", "size"), [(True, (40, 40)), (False, (53, 40))])
def test_to_size(server: Server, crop: bool, size: tuple[int, int]) -> None:
    body = {"upscaler_1": "Lanczos", "resize_mode": 1, "upscaling_resize_w": 40, "upscaling_resize_h": 40, "upscaling_crop": crop}
    assert enlarge(server, **body).size == size


def test_two_upscalers_are_mixed(server: Server) -> None:
    first, second = (np.asarray(enlarge(server, upscaler_1=name)).astype(float) for name in ("Lanczos", "Nearest"))
    mixed = np.asarray(enlarge(server, upscaler_1="Lanczos", upscaler_2="Nearest", extras_upscaler_2_visibility=0.25)).astype(float)
    assert np.abs(mixed - (0.75 * first + 0.25 * second)).max() <= 1


def test_transparency_is_kept(server: Server) -> None:
    image = PICTURE.convert("RGBA")
    image.putalpha(128)
    result = enlarge(server, image=to_base64(image), upscaler_1="Lanczos")
    assert (result.mode, result.size) == ("RGBA", (32, 24))
    assert result.getpixel((5, 5))[3] == 128  # type: ignore[index]


def test_infotext_says_what_was_done_and_keeps_what_was_there(server: Server) -> None:
    answer = server.post("/sdapi/v1/extra-single-image", {"image": with_text(), "upscaler_1": "Lanczos", "upscaling_resize": 1.5})
    assert answer["html_info"] == "<p>Postprocess upscale by: 1.5, Postprocess upscaler: Lanczos</p>"
    assert read_info_from_image(from_base64(answer["image"]))[0] == f"{TEXT}, Postprocess upscale by: 1.5, Postprocess upscaler: Lanczos"


def test_batch(server: Server) -> None:
    pictures = [{"data": to_base64(PICTURE.resize((size, size))), "name": f"{size}.png"} for size in (8, 16)]
    answer = server.post("/sdapi/v1/extra-batch-images", {"imageList": pictures, "upscaler_1": "Nearest"})
    assert [from_base64(text).size for text in answer["images"]] == [(16, 16), (32, 32)]
    hidden = server.post("/sdapi/v1/extra-batch-images", {"imageList": pictures, "show_extras_results": False})
    assert hidden["images"] == []


def test_interrogate_says_that_it_is_not_available(server: Server) -> None:
    answer = server.client.post("/sdapi/v1/interrogate", json={"image": to_base64(PICTURE), "model": "clip"})
    assert answer.status_code == 501
    assert "not available" in answer.json()["detail"]


def test_png_info(server: Server) -> None:
    answer = server.post("/sdapi/v1/png-info", {"image": f"data:image/png;base64,{with_text()}"})
    assert answer["info"] == TEXT
    assert answer["items"] == {"note": "ü"}
    assert answer["parameters"]["Seed"] == "1"
    assert answer["parameters"]["Size-1"] == "16"
    assert answer["parameters"]["Schedule type"] == "Automatic"


def test_png_info_of_a_picture_without_any(server: Server) -> None:
    assert server.post("/sdapi/v1/png-info", {"image": to_base64(PICTURE)}) == {"info": "", "items": {}, "parameters": {}}


def test_png_info_of_an_answer(server: Server) -> None:
    answer = server.txt2img(prompt="a cat", seed=3)
    read = server.post("/sdapi/v1/png-info", {"image": answer["images"][0]})
    assert read["parameters"]["Prompt"] == "a cat"
    assert read["parameters"]["Seed"] == "3"
