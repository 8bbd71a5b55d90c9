"""Reference pictures in a real application: what Kontext, Canny and Depth models get from img2img, from the panel and from clients."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.families.flux.program import FluxProgram, place_references
from backend.families.qwenimage.program import QwenProgram
from backend.nn.qwen_vision import prepare_picture
from backend.text_processing import picture_chat_engine
from modules.api.api import create_api
from modules.application import Application
from modules.scripts.without_page import build_controls
from tests.support.applications import installed_application
from tests.support.extensions import import_builtin, loaded_builtin
from tests.support.flux2_networks import write_flux2
from tests.support.flux_checkpoints import write_flux
from tests.support.qwenimage_networks import write_qwenimage

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SIDE_PX = 64


@dataclass
class Site:
    app: Application
    client: TestClient

    def post(self, path: str, model: str, args: list[Any] | None, **fields: Any) -> Any:
        body: dict[str, Any] = {
            "prompt": "a cat", "seed": 1, "steps": 2, "width": SIDE_PX, "height": SIDE_PX, "sampler_name": "Euler", "cfg_scale": 1,
            "override_settings": {"sd_model_checkpoint": model}, "override_settings_restore_afterwards": False, **fields,
        }  # fmt: skip
        if args is not None:
            body["alwayson_scripts"] = {"Reference pictures": {"args": args}}
        return self.client.post(path, json=body)

    def make(self, model: str, args: list[Any] | None = None, init: str | None = None, **fields: Any) -> tuple[np.ndarray, str]:
        """The picture and its infotext."""
        path, more = ("/sdapi/v1/txt2img", {}) if init is None else ("/sdapi/v1/img2img", {"init_images": [init], "denoising_strength": 1.0})
        answer = self.post(path, model, args, **more, **fields)
        assert answer.status_code == 200, answer.text
        return pixels(answer.json()["images"][0]), answer.json()["info"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("references")
    memory_management.configure(BackendConfig(), probe_devices(BackendConfig(device_ids=("cpu",))))
    for name in ("dev", "flux1-Kontext-dev"):
        write_flux(folder, "all-in-one", name=name)
    write_flux(folder, "all-in-one", name="canny", in_channels=128, out_channels=64)
    write_flux(folder, "original", name="parts")
    write_qwenimage(folder, "all-in-one", name="qwen_image_edit_2509")
    write_flux2(folder, "all-in-one", name="klein")
    with installed_application(folder, api=True) as app, loaded_builtin(app, "reference_pictures", "sd_forge_controlnet"):
        app.options.live_previews_enable = False
        build_controls(app)
        fastapi_app = FastAPI()
        create_api(app, fastapi_app)
        with TestClient(fastapi_app) as client:
            yield Site(app, client)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of what the network read, call by call."""
    seen: list[dict[str, tuple[int, ...]]] = []
    start = FluxProgram.start

    def noted(self: FluxProgram, rows: dict[str, Tensor], **options: Any) -> Any:
        seen.append({name: tuple(tensor.shape) for name, tensor in rows.items()})
        return start(self, rows, **options)

    monkeypatch.setattr(FluxProgram, "start", noted)
    return seen


def png(seed: int = 1, width: int = SIDE_PX, height: int = SIDE_PX) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def pixels(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def references_of(call: dict[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [shape[-2:] for name, shape in call.items() if name.startswith("reference")]


def test_kontext_reads_img2img_s_picture(site: Site, rows: list[Any]) -> None:
    """The file's name tells Kontext, in any case; a plain dev reads none; the panel's choice overrides both."""
    own, info = site.make("flux1-Kontext-dev", init=png())
    assert references_of(rows[-1]) == [(8, 8)] and "Reference pictures: 1" in info
    without, info = site.make("flux1-Kontext-dev", [True, "No"], init=png())
    assert references_of(rows[-1]) == [] and "Reference pictures" not in info
    assert np.abs(own - without).mean() > 0.3
    site.make("dev", init=png())
    assert references_of(rows[-1]) == []
    forced, _ = site.make("dev", [True, "Yes"], init=png())
    assert references_of(rows[-1]) == [(8, 8)] and np.array_equal(forced, own), "the same weights under another name"


def test_the_panel_adds_up_to_four_pictures(site: Site, rows: list[Any]) -> None:
    """Sides become whole tokens of 16 pixels; each picture changes the result; hires fix keeps them."""
    first, info = site.make("flux1-Kontext-dev", [True, "Automatic", "None", png(1, 40, 70)])
    assert references_of(rows[-1]) == [(8, 4)] and "Reference pictures: 1" in info
    both, _ = site.make("flux1-Kontext-dev", [True, "Automatic", "None", png(1, 40, 70), None, png(2), ""], enable_hr=True, hr_scale=1.5)
    assert references_of(rows[-1]) == [(8, 4), (8, 8)] and rows[-1]["x"][-2:] == (12, 12)
    assert first.shape != both.shape
    closed, _ = site.make("flux1-Kontext-dev", [False, "Automatic", "None", png(1)])
    assert references_of(rows[-1]) == [] and not np.array_equal(closed, first)
    site.make("flux1-Kontext-dev", [True, "Automatic", "None", *(png(seed) for seed in (2, 3, 4, 5))], init=png(1))
    assert len(references_of(rows[-1])) == 4


def test_klein_reads_the_panel_s_pictures_and_img2img_s_if_it_says_so(site: Site) -> None:
    """In txt2img and img2img; by itself img2img's picture is where the picture begins, and no reference."""
    alone, info = site.make("klein")
    assert "Reference pictures" not in info
    one, info = site.make("klein", [True, "Automatic", "None", png(1, 320, 256)])
    assert "Reference pictures: 1" in info and not np.array_equal(alone, one)
    both, info = site.make("klein", [True, "Automatic", "None", png(1, 320, 256), png(2, 128, 256)])
    assert "Reference pictures: 2" in info and not np.array_equal(both, one)
    begun, info = site.make("klein", init=png(1))
    assert "Reference pictures" not in info
    read, info = site.make("klein", [True, "Yes"], init=png(1))
    assert "Reference pictures: 1" in info and not np.array_equal(read, begun)


def test_large_references_become_a_megapixel(site: Site) -> None:
    fitting_size = import_builtin("reference_pictures/scripts", "reference_pictures").fitting_size
    assert fitting_size(64, 64, 16) == (64, 64) and fitting_size(3, 2000, 16) == (16, 2000)
    for width, height in ((4000, 3000), (1025, 1024), (600, 10000)):
        fitted = fitting_size(width, height, 16)
        assert fitted[0] * fitted[1] <= 1.1 * 1024 * 1024 and not fitted[0] % 16 and not fitted[1] % 16


def test_a_canny_model_makes_its_picture_from_edges(site: Site, rows: list[Any]) -> None:
    edges, info = site.make("canny", [True, "Automatic", "canny", png(1, 96, 64)])
    assert rows[-1]["x"] == (1, 32, 8, 8) and "Reference pictures" not in info
    as_given, _ = site.make("canny", [True, "Automatic", "None", png(1, 96, 64)])
    assert np.abs(edges - as_given).mean() > 1
    site.make("canny", init=png(), batch_size=2)
    assert rows[-1]["x"] == (2, 32, 8, 8)


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        ("dev", ["false", "Automatic", "None"], "send true or false"),
        ("dev", ["/etc/passwd"], "send true or false"),
        ("canny", None, "canny.safetensors makes pictures from a picture of edges or depth"),
        ("dev", [True, "Perhaps"], "'Perhaps' says whether"),
        ("dev", [True, "Automatic", "nothing"], "no preprocessor 'nothing'"),
        ("dev", [True, "Automatic", "None", "no picture"], "Reference picture 1"),
        ("dev", [True, "Automatic", "None", 5], "send a picture as base64"),
        ("dev", [True, "Automatic", "None", *[None] * 4, 1], "takes at most 7"),
    ],
)
def test_what_is_wrong_is_the_client_s_mistake(site: Site, model: str, args: list[Any] | None, words: str) -> None:
    answer = site.post("/sdapi/v1/txt2img", model, args)
    assert answer.status_code == 422 and words in answer.text, answer.text


def test_references_are_placed_side_by_side() -> None:
    """One begins at (1, 0, 0), as Kontext was trained; each further one where the canvas stays narrower."""
    one, two, three = place_references([(8, 8), (8, 8), (8, 8)])
    assert one[0].tolist() == [1, 0, 0] and one[-1].tolist() == [1, 3, 3]
    assert two[0].tolist() == [1, 4, 0] and three[0].tolist() == [1, 0, 4]
    places = torch.cat([one, two, three])
    assert len({tuple(place.tolist()) for place in places}) == len(places), "no two tokens share a position"


def test_parts_that_are_missing_are_named_with_file_size_and_folder(site: Site) -> None:
    answer = site.post("/sdapi/v1/txt2img", "parts", None)
    assert answer.status_code == 422
    for words in (
        "parts.safetensors needs a CLIP-L text encoder, a T5-XXL text encoder and a VAE",
        "t5xxl_fp16.safetensors (9.5 GB)",
        "models/text_encoder",
        "ae.safetensors (0.34 GB)",
        "models/VAE",
    ):
        assert words in answer.text, answer.text


def test_qwen_image_edit_reads_references_and_its_text_encoder_sees_them(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """img2img's picture first, then the panel's, for both prompts; the same pictures are not encoded again for the next seed."""
    calls: list[tuple[dict[str, tuple[int, ...]], int]] = []
    start, shown = QwenProgram.start, []

    def noted(self: QwenProgram, rows: dict[str, Tensor], **options: Any) -> Any:
        calls.append(({name: tuple(tensor.shape) for name, tensor in rows.items()}, rows["x"].shape[0]))
        return start(self, rows, **options)

    def seen(picture: np.ndarray, *args: Any) -> Any:
        shown.append(picture.shape)
        return prepare_picture(picture, *args)

    monkeypatch.setattr(QwenProgram, "start", noted)
    monkeypatch.setattr(picture_chat_engine, "prepare_picture", seen)
    fields: dict[str, Any] = {"cfg_scale": 3, "negative_prompt": "dark", "width": SIDE_PX, "height": SIDE_PX}
    both, info = site.make("qwen_image_edit_2509", [True, "Automatic", "None", png(2, 40, 70)], init=png(), **fields)
    assert references_of(calls[-1][0]) == [(8, 8), (8, 4)] and "Reference pictures: 2" in info
    assert shown == [(64, 64, 3), (70, 40, 3)] * 2 and calls[-1][1] == 2, "prompt and negative prompt, and both in one call"
    site.make("qwen_image_edit_2509", [True, "Automatic", "None", png(2, 40, 70)], init=png(), seed=2, **fields)
    assert len(shown) == 4
    other, _ = site.make("qwen_image_edit_2509", [True, "Automatic", "None", png(3, 40, 70)], init=png(), **fields)
    assert len(shown) == 8 and np.abs(both - other).mean() > 0.1
    site.make("qwen_image_edit_2509", [True, "No", "None"], init=png(), **fields)
    assert len(shown) == 8 and references_of(calls[-1][0]) == []
    two = site.post("/sdapi/v1/img2img", "qwen_image_edit_2509", None, init_images=[png(1), png(2)], batch_size=2)
    assert two.status_code == 422 and "2 initial pictures were sent at once" in two.text
