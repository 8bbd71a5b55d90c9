"""Client mistakes and the answer to each: a 4xx that says what is wrong, never a 500, never a stack trace."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from PIL import Image

from tests.modules.api.conftest import Server, running_server, to_base64

TXT2IMG, IMG2IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
PICTURE = to_base64(Image.new("RGB", (64, 64), "red"))
TEXT_FILE = base64.b64encode(b"not a picture at all").decode()
CUT_PICTURE = base64.b64encode(base64.b64decode(PICTURE)[:40]).decode()


@dataclass(frozen=True)
class Case:
    """A body (a dict, or raw bytes), and what the answer must contain."""

    name: str
    path: str
    body: Any
    status: int
    says: str


def txt2img(name: str, says: str, status: int = 422, **body: Any) -> Case:
    return Case(f"txt2img {name}", TXT2IMG, body, status, says)


def img2img(name: str, says: str, status: int = 422, **body: Any) -> Case:
    return Case(f"img2img {name}", IMG2IMG, {"init_images": [PICTURE], **body}, status, says)


def local(url: str) -> Case:
    return img2img(f"URL {url}", "own network", init_images=[url])


CASES = [
    # sizes and numbers
    txt2img("negative width", "width", width=-512),
    txt2img("zero height", "height", height=0),
    txt2img("side below one latent", "width: Input should be greater than or equal to 8", width=7),
    txt2img("side too large", "less than or equal to 8192", width=100_000),
    txt2img("area too large", "16.8 megapixels", width=8192, height=8192),
    txt2img("batch area too large", "134 megapixels per batch", width=2048, height=2048, batch_size=64),
    txt2img("a million steps", "steps: Input should be less than or equal to 1000", steps=10**6),
    txt2img("no steps", "steps", steps=0),
    txt2img("negative steps", "steps", steps=-1),
    txt2img("half a step", "steps: Input should be a valid integer", steps=20.5),
    txt2img("huge batch", "batch_size: Input should be less than or equal to 128", batch_size=10**6),
    txt2img("empty batch", "batch_size", batch_size=0),
    txt2img("too many batches", "n_iter", n_iter=10**9),
    txt2img("too many pictures", "12800 pictures are too many", batch_size=128, n_iter=100, width=64, height=64),
    txt2img("negative CFG", "cfg_scale", cfg_scale=-3),
    txt2img("huge CFG", "cfg_scale", cfg_scale=1e9),
    txt2img("negative denoising", "denoising_strength", denoising_strength=-0.1),
    txt2img("denoising above 1", "denoising_strength", denoising_strength=1.5),
    txt2img("seed too large", "seed", seed=2**70),
    txt2img("negative seed", "seed", seed=-7),
    txt2img("variation strength", "subseed_strength", subseed_strength=3),
    txt2img("refiner switch", "refiner_switch_at", refiner_switch_at=7),
    txt2img("negative churn", "s_churn", s_churn=-1),
    txt2img("hires scale", "hr_scale", enable_hr=True, hr_scale=1000),
    txt2img("hires without scale", "enable_hr needs a scale", enable_hr=True, hr_scale=0),
    txt2img("hires target too large", "hires pass: 8000x8000 px is too large", enable_hr=True, width=2000, height=2000, hr_scale=4),
    # wrong types
    txt2img("list as prompt", "prompt: Input should be a valid string", prompt=["a", "b"]),
    txt2img("word as steps", "steps", steps="many"),
    txt2img("object as seed", "seed", seed={"value": 1}),
    txt2img("text as styles", "styles", styles="oil"),
    txt2img("number in styles", "styles", styles=[1]),
    txt2img("list as override_settings", "override_settings", override_settings=[1]),
    txt2img("list as alwayson_scripts", "alwayson_scripts", alwayson_scripts=[1]),
    txt2img("word as flag", "enable_hr", enable_hr="perhaps"),
    txt2img("prompt of a megabyte", "prompt: String should have at most 100000 characters", prompt="a" * 1_000_000),
    # names
    txt2img("unknown sampler", "'Eulerr'", sampler_name="Eulerr"),
    txt2img("unknown sampler_index", "'Eulerr'", sampler_index="Eulerr"),
    txt2img("unknown scheduler", "'Karass'", scheduler="Karass"),
    txt2img("unknown script", "Script 'x/y plot' not found", script_name="x/y plot"),
    txt2img("unknown always-on script", "Always on script 'ADetailer' not found", alwayson_scripts={"ADetailer": {"args": []}}),
    txt2img("unknown hires upscaler", "no upscaler '4x-UltraSharp'", enable_hr=True, hr_upscaler="4x-UltraSharp"),
    txt2img("unknown hires checkpoint", "'gone.ckpt'", enable_hr=True, hr_checkpoint_name="gone.ckpt"),
    txt2img("unknown refiner", "'sd_xl_refiner'", refiner_checkpoint="sd_xl_refiner", refiner_switch_at=0.8),
    # settings
    txt2img("unknown setting", "Did you mean 'samples_format'", override_settings={"sample_format": "png"}),
    txt2img(
        "unknown checkpoint", "'gone.safetensors' does not exist; there are: tiny", override_settings={"sd_model_checkpoint": "gone.safetensors"}
    ),
    txt2img("setting of a wrong type", "CLIP_stop_at_last_layers", override_settings={"CLIP_stop_at_last_layers": "two"}),
    txt2img("setting out of range", "CLIP_stop_at_last_layers", override_settings={"CLIP_stop_at_last_layers": 99}),
    txt2img("setting of no choice", "randn_source", override_settings={"randn_source": "TPU"}),
    txt2img("folder above the data folder", "outdir_samples", override_settings={"outdir_samples": "../../../etc"}),
    txt2img("folder of the system", "outdir_txt2img_samples", override_settings={"outdir_txt2img_samples": "/etc/cron.d"}),
    txt2img("VAE by path", "VAE or text encoder '/etc/passwd'", override_settings={"forge_additional_modules": ["/etc/passwd"]}),
    txt2img("infotext with impossible values", "infotext: steps", infotext="a\nSteps: 99999999, Sampler: Euler, Seed: 1, Size: 64x64"),
    # pictures
    img2img("no picture", "Init image not found", 404, init_images=[]),
    img2img("null picture list", "Init image not found", 404, init_images=None),
    img2img("text file as picture", "init_images[0]: is not a readable picture", init_images=[TEXT_FILE]),
    img2img("cut picture", "init_images[0]: is not a readable picture", init_images=[CUT_PICTURE]),
    img2img("no base64", "init_images[1]: '%%%' is not base64", init_images=[PICTURE, "%%%"]),
    img2img("empty text as picture", "init_images[0]: is empty", init_images=[""]),
    img2img("number as picture", "init_images", init_images=[5]),
    img2img("picture not in a list", "init_images", init_images=PICTURE),
    img2img("file path as picture", "is not", init_images=["/etc/passwd"]),
    img2img("file URL as picture", "is not base64", init_images=["file:///etc/passwd"]),
    img2img("mask that is none", "mask: is not a readable picture", mask=TEXT_FILE),
    img2img("fill mode", "inpainting_fill", inpainting_fill=9),
    img2img("resize mode", "resize_mode", resize_mode=-1),
    img2img("mask blur", "mask_blur", mask_blur=-4),
    img2img("padding", "inpaint_full_res_padding", inpaint_full_res_padding=-1),
    local("http://127.0.0.1:7860/internal/sysinfo"),
    local("http://localhost/x.png"),
    local("http://[::1]/x.png"),
    local("http://169.254.169.254/latest/meta-data/"),
    local("https://10.0.0.1/x.png"),
    local("http://2130706433/x.png"),
    local("http://[::ffff:192.168.0.1]/x.png"),
    local("http://0/x.png"),
    img2img("URL without a host", "is not an http or https URL", init_images=["http:///x.png"]),
    # bodies
    Case("no body", TXT2IMG, b"", 422, "body"),
    Case("list as body", TXT2IMG, b"[]", 422, "dict"),
    Case("text as body", TXT2IMG, b'"a cat"', 422, "dict"),
    Case("broken JSON", TXT2IMG, b'{"prompt": ', 422, "JSON decode error"),
    Case("NaN", TXT2IMG, b'{"cfg_scale": NaN}', 422, "NaN is not a JSON number"),
    Case("infinity", TXT2IMG, b'{"cfg_scale": -Infinity}', 422, "not a JSON number"),
    Case("number too large", TXT2IMG, b'{"cfg_scale": 1e999}', 422, "too large for a number"),
    Case("NaN deep inside", TXT2IMG, b'{"alwayson_scripts": {"x": {"args": [NaN]}}}', 422, "not a JSON number"),
    Case("number of 5000 digits", TXT2IMG, b'{"seed": ' + b"9" * 5000 + b"}", 422, "a number of 5000 digits"),
    Case("half a surrogate", TXT2IMG, b'{"prompt": "\\ud800"}', 422, "surrogate"),
    Case("not UTF-8", TXT2IMG, b'{"prompt": "\xff"}', 422, "UTF-8"),
    Case("nested too deeply", TXT2IMG, b"[" * 100_000, 422, "nested too deeply"),
    # the other routes
    Case("options: unknown key", "/sdapi/v1/options", {"no_such": 1}, 422, "there is no setting 'no_such'"),
    Case("options: wrong type", "/sdapi/v1/options", {"samples_save": "perhaps"}, 422, "samples_save"),
    Case("options: unknown checkpoint", "/sdapi/v1/options", {"sd_model_checkpoint": "gone"}, 422, "'gone'"),
    Case("options: VAE by path", "/sdapi/v1/options", {"forge_additional_modules": ["/etc/passwd"]}, 422, "VAE or text encoder '/etc/passwd'"),
    Case("options: unknown VAE", "/sdapi/v1/options", {"sd_vae": "gone"}, 422, "VAE or text encoder 'gone' does not exist"),
    Case("options: folder", "/sdapi/v1/options", {"outdir_samples": "/etc"}, 422, "--api-auth"),
    Case("options: list", "/sdapi/v1/options", [1], 422, "dict"),
    Case("extras: unknown upscaler", "/sdapi/v1/extra-single-image", {"image": PICTURE, "upscaler_1": "ESRGAN"}, 422, "no upscaler 'ESRGAN'"),
    Case("extras: no picture", "/sdapi/v1/extra-single-image", {"upscaler_1": "Lanczos"}, 422, "image: is empty"),
    Case("extras: factor", "/sdapi/v1/extra-single-image", {"image": PICTURE, "upscaling_resize": 0}, 422, "upscaling_resize"),
    Case("extras: huge factor", "/sdapi/v1/extra-single-image", {"image": PICTURE, "upscaling_resize": 1000}, 422, "upscaling_resize"),
    Case("extras: mode", "/sdapi/v1/extra-single-image", {"image": PICTURE, "resize_mode": 2}, 422, "resize_mode"),
    Case("extras: face restoration", "/sdapi/v1/extra-single-image", {"image": PICTURE, "gfpgan_visibility": 1}, 422, "face restoration"),
    Case("extras: empty batch", "/sdapi/v1/extra-batch-images", {"imageList": []}, 422, "imageList: is empty"),
    Case("extras: bad batch entry", "/sdapi/v1/extra-batch-images", {"imageList": [{"data": "x"}]}, 422, "imageList.0.name"),
    Case("png-info: none", "/sdapi/v1/png-info", {}, 422, "image"),
    Case("png-info: text", "/sdapi/v1/png-info", {"image": TEXT_FILE}, 422, "image: is not a readable picture"),
    Case("progress: wrong type", "/internal/progress", {"id_live_preview": "x"}, 422, "id_live_preview"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the whole table: a mistake must not affect the next request."""
    with running_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mistakes(server: Server, case: Case) -> None:
    raw = case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode()
    answer = server.client.post(case.path, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code == case.status, answer.text
    body = answer.json()
    assert set(body) == {"error", "detail", "body", "errors"}
    assert case.says in f"{body['errors']} {body['detail']}"
    assert "Traceback" not in answer.text
    assert len(answer.text) < 5000, "an answer does not repeat what was sent"
    assert answer.headers["X-Process-Time"]
    assert server.maker.requests == []


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 25
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_server_is_sound_afterwards(server: Server) -> None:
    for case in CASES[:5]:
        server.client.post(case.path, json=case.body)
    assert server.txt2img(prompt="a cat", steps=1)["images"]
    server.maker.requests.clear()


def test_other_methods_and_paths_are_refused(server: Server) -> None:
    assert server.client.get(TXT2IMG).status_code == 405
    assert server.client.post("/sdapi/v1/no-such-route", json={}).status_code == 404


def test_a_body_that_is_no_json_by_its_header_is_refused(server: Server) -> None:
    answer = server.client.post(TXT2IMG, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 422
    assert "send the header Content-Type: application/json" in answer.json()["errors"]


def test_a_picture_bomb_is_refused(server: Server) -> None:
    bomb = to_base64(Image.new("1", (20_000, 20_000)))
    answer = server.client.post(IMG2IMG, json={"init_images": [bomb]})
    assert answer.status_code == 422
    assert "too large" in answer.json()["detail"]
