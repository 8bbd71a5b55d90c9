"""From an HTTP request to a picture and a file, with a narrow random model in the layout of Stable Diffusion 1.x."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from modules.api.api import create_api
from modules.pictures.metadata import read_info_from_image
from tests.modules.api.conftest import PictureMaker, Server, from_base64, info_of, to_base64
from tests.support.applications import installed_application
from tests.support.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    checkpoints = folder / "models" / "Stable-diffusion"
    checkpoints.mkdir(parents=True)
    write_checkpoint(checkpoints / "narrow.safetensors", "sd15", is_shallow=True, metadata={"modelspec.resolution": "64x64"})
    with installed_application(folder, api=True) as app:
        app.options.set("stealth_pnginfo_option", "None")
        fastapi_app = FastAPI()
        create_api(app, fastapi_app)
        with TestClient(fastapi_app) as client:
            yield Server(app, client, PictureMaker(app))


def pixels(text: str) -> np.ndarray:
    return np.asarray(from_base64(text).convert("RGB"))


def test_the_same_request_gives_the_same_picture(server: Server) -> None:
    first, second, other = (server.txt2img(prompt="a cat", steps=2, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(pixels(first["images"][0]), pixels(second["images"][0]))
    assert not np.array_equal(pixels(first["images"][0]), pixels(other["images"][0]))


def test_an_infotext_gives_its_picture_again(server: Server) -> None:
    first = server.txt2img(
        prompt="a (cat:1.2), [b:c:0.5]", negative_prompt="dog", steps=3, seed=5, sampler_name="DPM++ 2M", scheduler="Karras", cfg_scale=4
    )
    again = server.txt2img(infotext=info_of(first)["infotexts"][0])
    assert np.array_equal(pixels(first["images"][0]), pixels(again["images"][0]))


def test_the_saved_file_is_the_picture_of_the_answer(server: Server) -> None:
    folder = Path(server.app.options.outdir_txt2img_samples)
    before = set(folder.rglob("*.png"))
    answer = server.txt2img(prompt="a cat", steps=2, seed=1, save_images=True)
    [saved] = set(folder.rglob("*.png")) - before
    with Image.open(saved) as image:
        assert np.array_equal(np.asarray(image), pixels(answer["images"][0]))
        assert read_info_from_image(image)[0] == info_of(answer)["infotexts"][0]


def test_img2img_and_inpainting(server: Server) -> None:
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    body = {"prompt": "a cat", "steps": 4, "seed": 1, "init_images": [to_base64(start)], "denoising_strength": 0.6}
    whole = pixels(server.img2img(**body)["images"][0])
    inpainted = pixels(server.img2img(**body, mask=to_base64(mask), mask_blur=0, inpaint_full_res=False)["images"][0])
    assert not np.array_equal(whole, np.asarray(start))
    assert np.array_equal(inpainted[:, 33:], np.asarray(start)[:, 33:])
    assert not np.array_equal(inpainted[:, :31], np.asarray(start)[:, :31])


def test_hires(server: Server) -> None:
    body = {"prompt": "a cat", "steps": 2, "seed": 1, "enable_hr": True, "denoising_strength": 0.5, "hr_scale": 1.5}
    for upscaler in ("Latent", "Lanczos"):
        answer = server.txt2img(**body, hr_upscaler=upscaler)
        assert from_base64(answer["images"][0]).size == (96, 96)
        assert f"Hires upscaler: {upscaler}" in info_of(answer)["infotexts"][0]


def test_interrupt_ends_a_long_job_soon(server: Server) -> None:
    with ThreadPoolExecutor() as pool:
        job = pool.submit(server.txt2img, prompt="a cat", steps=1000, seed=1)
        while server.get("/sdapi/v1/progress", params={"skip_current_image": "true"})["state"]["sampling_step"] < 1:
            threading.Event().wait(0.02)
        server.post("/sdapi/v1/interrupt")
        answer = job.result(timeout=60)
    assert answer["parameters"]["steps"] == 1000
    assert server.app.state.sampling_step < 1000


def test_embeddings_and_memory_of_the_loaded_model(server: Server) -> None:
    server.txt2img(prompt="a cat", steps=1)
    assert server.get("/sdapi/v1/embeddings") == {"loaded": {}, "skipped": {}}
    assert server.get("/sdapi/v1/multi-gpu")["slots"]
    assert server.post("/sdapi/v1/unload-checkpoint") == {}
    assert server.app.models.engine is None
    assert server.post("/sdapi/v1/reload-checkpoint") == {}
    assert server.app.models.engine is not None


def test_a_new_embedding_is_made_of_words_and_means_them(server: Server) -> None:
    body = {"name": "my cat!", "num_vectors_per_token": 2, "init_text": "red cat"}
    answer = server.post("/sdapi/v1/create/embedding", body)
    folder = server.app.config.embeddings_dirs[0]
    assert answer["info"] == f"create embedding filename: {folder / 'my cat.pt'}"
    assert server.get("/sdapi/v1/embeddings")["loaded"]["my cat"]["vectors"] == 2
    pictures = [server.txt2img(prompt=prompt, steps=2, seed=1)["images"][0] for prompt in ("my cat", "red cat", "blue dog")]
    assert pictures[0] != pictures[2]
    assert np.abs(np.asarray(from_base64(pictures[0])).astype(int) - np.asarray(from_base64(pictures[1])).astype(int)).max() == 0
    refused = server.client.post("/sdapi/v1/create/embedding", json=body)
    assert refused.status_code == 422
    assert "already" in refused.json()["detail"]
    server.post("/sdapi/v1/create/embedding", {**body, "overwrite_old": True, "init_text": ""})
    (folder / "my cat.pt").unlink()
    nameless = server.client.post("/sdapi/v1/create/embedding", json={"name": "../"})
    assert "cannot name an embedding" in nameless.json()["detail"]
