from __future__ import annotations

import base64
import io
import struct
import zlib

import pytest
from PIL import Image

from modules.api import picture_budget
from modules.api.limits import MAX_INPUT_PICTURE_PX, MAX_REQUEST_PX
from modules.api.picture_budget import Allowance, NoRoomError, PictureBudget, TooManyPicturesError
from modules.api.pools import decoders, fetchers, pool_for
from tests.modules.api.conftest import Server


def png_that_says(width: int, height: int) -> str:
    """A file of a few bytes whose header claims that many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")).decode()


def refused(server: Server, **body: object) -> tuple[int, str]:
    answer = server.client.post("/sdapi/v1/img2img", json=body)
    return answer.status_code, answer.json()["detail"]


@pytest.mark.parametrize("size", [(8193, 8192), (11_000, 11_000), (13_300, 13_300), (60_000, 60_000)])
def test_the_limit_of_one_picture_is_the_one_that_is_said(server: Server, size: tuple[int, int]) -> None:
    status, detail = refused(server, init_images=[png_that_says(*size)])
    assert (status, MAX_INPUT_PICTURE_PX) == (422, 67_108_864)
    assert "too large; the limit is 67.1 megapixels" in detail
    assert refused(server, init_images=[png_that_says(8192, 8192)])[1].startswith("init_images[0]: is not a readable picture")


def test_the_pictures_of_a_request_are_counted_before_they_are_decoded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(buffer, "PNG")
    small = base64.b64encode(buffer.getvalue()).decode()
    monkeypatch.setattr(picture_budget.Allowance.__init__, "__defaults__", (2_500_000, 1000))
    status, detail = refused(server, init_images=[small, small, small])
    assert status == 413 and "init_images[2]: with this one, the request's pictures have 3.0 megapixels; the limit is 2.5" in detail
    assert server.client.post("/sdapi/v1/png-info", json={"image": small}).status_code == 200
    assert picture_budget.whole_budget.held_px == 0
    monkeypatch.setattr(picture_budget.whole_budget, "limit_px", 999_999)
    answer = server.client.post("/sdapi/v1/png-info", json={"image": small})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
    assert picture_budget.whole_budget.held_px == 0


def test_pixels_and_pictures_are_counted_and_given_back() -> None:
    budget = PictureBudget(100)
    one, other = Allowance(budget, 80, 2), Allowance(budget, 80, 2)
    one.take(80, "a")
    with pytest.raises(TooManyPicturesError):
        one.take(1, "b")
    with pytest.raises(NoRoomError):
        other.take(21, "c")
    other.take(20, "c")
    one.close()
    assert budget.held_px == 20
    other.take(1, "d")
    with pytest.raises(TooManyPicturesError, match="may contain 2 pictures"):
        other.take(1, "e")
    other.close()
    assert budget.held_px == 0
    assert MAX_REQUEST_PX == 2 * MAX_INPUT_PICTURE_PX


def test_requests_with_urls_wait_in_a_pool_of_their_own() -> None:
    nested = {"alwayson_scripts": {"controlnet": {"args": [{"image": " https://example.org/x.png"}]}}}
    assert pool_for(nested) is fetchers()
    assert pool_for({"init_images": ["aGVsbG8=" * 1000], "prompt": "see http://x"}) is decoders()
