"""The ControlNet extension in a real application: requests as clients send them, answers, pictures, infotext, and the page's controls."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from modules import scripts
from modules.api.api import create_api
from modules.application import Application
from modules.errors import RequestError
from modules.pictures.resizing import resize_by_mode
from modules.processing.latents import pil_to_pixels
from modules.scripts import callbacks
from modules.scripts.without_page import build_controls
from modules_forge import shared
from tests.support.applications import installed_application
from tests.support.checkpoints import write_checkpoint
from tests.support.controlnets import build_controlnet, build_union, write_control_lora, write_controlnet
from tests.support.ip_adapters import adapter_tables, build_tower, write_adapter_file, write_tower

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SIDE_PX = 64


@dataclass
class Site:
    """The application's API, and the titles of its control models."""

    app: Application
    client: TestClient
    titles: dict[str, str]
    _made: dict[str, Any] = field(default_factory=dict)

    def known(self, *units: Any, **fields: Any) -> Any:
        """As `txt2img`, but a request that was made before is not made again: for pictures that others are compared with."""
        key = json.dumps([units, fields], sort_keys=True)
        if key not in self._made:
            self._made[key] = self.txt2img(*units, **fields)
        return self._made[key]

    def post(self, path: str, body: Any) -> Any:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def txt2img(self, *units: Any, **fields: Any) -> Any:
        body = {"prompt": "a cat", "seed": 1, "steps": 3, "width": SIDE_PX, "height": SIDE_PX, "sampler_name": "Euler", "cfg_scale": 4, **fields}
        return self.post("/sdapi/v1/txt2img", {**body, "alwayson_scripts": {"controlnet": {"args": list(units)}}})

    def refused(self, *units: Any, **fields: Any) -> str:
        body = {"prompt": "x", "seed": 1, "steps": 2, "width": SIDE_PX, "height": SIDE_PX, **fields}
        answer = self.client.post("/sdapi/v1/txt2img", json={**body, "alwayson_scripts": {"ControlNet": {"args": list(units)}}})
        assert answer.status_code == 422, answer.text
        return str(answer.json())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("controlnet")
    memory_management.configure(BackendConfig(), probe_devices(BackendConfig(device_ids=("cpu",))))
    checkpoints = folder / "models" / "Stable-diffusion"
    models = {family: write_checkpoint(checkpoints / f"{family}.safetensors", family, is_shallow=True) for family in ("sd15", "sdxl")}
    with installed_application(folder, api=True) as app:
        app.options.live_previews_enable = False
        models_dir = folder / "models" / "ControlNet"
        for seed in (1, 2):
            write_controlnet(models_dir / "sub" / f"canny_{seed}.safetensors", build_controlnet(models["sd15"], seed=seed, residual_scale=0.5))
        write_controlnet(models_dir / "union.safetensors", build_union(models["sdxl"]), layout="diffusers")
        write_control_lora(models_dir / "control-lora.safetensors", models["sd15"])
        write_adapter_file(models_dir / "ip-adapter.safetensors", adapter_tables(models["sd15"], "plain"))
        write_controlnet(models_dir / "big.safetensors", build_controlnet(models["sdxl"]), layout="diffusers")
        (models_dir / "broken.pth").write_bytes(b"no model")
        app.options.set("sd_model_checkpoint", "sd15.safetensors")
        scripts.load_scripts(app)
        build_controls(app)
        fastapi_app = FastAPI()
        create_api(app, fastapi_app)
        callbacks.app_started_callback(None, fastapi_app)
        with TestClient(fastapi_app) as client:
            listed = client.get("/controlnet/model_list").json()["model_list"]
            yield Site(app, client, {title.split(" [")[0]: title for title in listed})
    scripts.unload_scripts()


def _picture(seed: int = 1, side_px: int = SIDE_PX) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _pixels(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def _first(answer: Any) -> np.ndarray:
    return _pixels(answer["images"][0])


def _unit(site: Site, **fields: Any) -> dict[str, Any]:
    return {"image": _picture(), "model": site.titles["canny_1"], "module": "canny", **fields}


def test_a_unit_changes_the_picture_and_its_map_comes_behind(site: Site) -> None:
    plain, guided = site.known(), site.txt2img(_unit(site))
    assert len(plain["images"]) == 1 and len(guided["images"]) == 2
    assert np.abs(_first(plain) - _first(guided)).max() > 2
    detected = _pixels(guided["images"][1])
    assert set(np.unique(detected)) <= {0, 255} and detected.max() == 255
    info = json.loads(guided["info"])
    text = info["extra_generation_params"]["ControlNet 0"]
    assert text.startswith(f"Module: canny, Model: {site.titles['canny_1']}, Weight: 1, Resize Mode: Crop and Resize")
    assert text.endswith("Guidance Start: 0, Guidance End: 1, Pixel Perfect: False, Control Mode: Balanced, Hr Option: Both")
    assert '"Module: canny' in info["infotexts"][0]


def test_what_is_off_or_weighs_nothing_changes_nothing(site: Site) -> None:
    plain = _first(site.known())
    for unit in (_unit(site, enabled=False), _unit(site, weight=0.0), {"enabled": False}):
        assert np.array_equal(plain, _first(site.txt2img(unit)))


@pytest.mark.parametrize("mode", [1, "my prompt is more important", "MY PROMPT IS MORE IMPORTANT", "Prompt"])
def test_control_modes_by_number_and_in_any_case(site: Site, mode: Any) -> None:
    balanced, soft = _first(site.known(_unit(site))), _first(site.txt2img(_unit(site, control_mode=mode)))
    assert not np.array_equal(balanced, soft)
    assert np.array_equal(soft, _first(site.known(_unit(site, control_mode="My prompt is more important"))))


def test_every_mode_makes_another_picture(site: Site) -> None:
    pictures = [_first(site.known(_unit(site, control_mode=mode))) for mode in (0, 1, 2)]
    assert not any(np.array_equal(one, other) for one, other in [pictures[:2], pictures[1:], pictures[::2]])


def test_two_units_and_old_names_of_fields(site: Site) -> None:
    second = {"input_image": _picture(2), "model": "CANNY_2", "module": "NONE", "resize_mode": "Inner Fit (Scale to Fit)", "lowvram": False}
    one, two = site.known(_unit(site)), site.txt2img(_unit(site), second)
    assert len(two["images"]) == 3 and not np.array_equal(_first(one), _first(two))
    assert np.array_equal(_pixels(two["images"][2]), _pixels(_picture(2)))
    assert f"Model: {site.titles['canny_2']}" in json.loads(two["info"])["extra_generation_params"]["ControlNet 1"]


def test_guidance_range_and_saved_maps(site: Site) -> None:
    whole, never = site.known(_unit(site)), site.txt2img(_unit(site, guidance_start=1.0, guidance_end=1.0, save_detected_map=False))
    assert len(never["images"]) == 1
    assert np.array_equal(_first(never), _first(site.known())) and not np.array_equal(_first(never), _first(whole))


def test_hires_passes_are_chosen(site: Site) -> None:
    hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.7, "hr_second_pass_steps": 2, "hr_cfg": 4.0}
    pictures = [_first(site.txt2img(_unit(site, hr_option=option), **hires)) for option in ("Both", "Low res only", "High res only", 2)]
    assert pictures[0].shape == (128, 128, 3)
    assert np.array_equal(pictures[2], pictures[3])
    assert not any(np.array_equal(one, other) for one, other in zip(pictures[:3], [pictures[1], pictures[2], pictures[0]]))


def test_img2img_takes_its_own_picture_and_masks_act(site: Site) -> None:
    body = {"init_images": [_picture(3)], "prompt": "x", "seed": 1, "steps": 4, "width": SIDE_PX, "height": SIDE_PX, "denoising_strength": 0.8}

    def run(**unit: Any) -> Any:
        units = [{"model": "canny_1", "module": "None", **unit}]
        return site.post("/sdapi/v1/img2img", {**body, "alwayson_scripts": {"ControlNet": {"args": units}}})

    own = run()
    assert np.array_equal(_pixels(own["images"][1]), _pixels(_picture(3)))
    half = np.zeros((SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    half[:, :32] = 255
    buffer = io.BytesIO()
    Image.fromarray(half).save(buffer, format="PNG")
    masked = run(mask_image=base64.b64encode(buffer.getvalue()).decode())
    assert not np.array_equal(_first(masked), _first(own))


def test_wrong_requests_are_refused_in_words(site: Site) -> None:
    assert "no image" in site.refused({"model": "canny_1"})
    assert "no model" in site.refused({"image": _picture()})
    assert "'nothing' does not exist" in site.refused({"image": _picture(), "model": "nothing"})
    assert "no preprocessor 'sideways'" in site.refused({"image": _picture(), "model": "canny_1", "module": "sideways"})
    for name, words in (("openpose_full", "body_pose_model.pth"), ("HED", "ControlNetHED.pth"), ("Tile_ColorFix", "tile_resample")):
        message = site.refused({"image": _picture(), "model": "canny_1", "module": name})
        assert words in message and (words.startswith("tile") or shared.preprocessor_dir in message)
    assert "is not base64" in site.refused({"image": "@@@", "model": "canny_1"})
    assert "control_mode" in site.refused(_unit(site, control_mode="sideways"))
    assert "weight" in site.refused(_unit(site, weight="much"))
    assert "guidance_start" in site.refused(_unit(site, guidance_start=0.9, guidance_end=0.1))
    assert "send an object" in site.refused("a text")
    assert "broken.pth" in site.refused(_unit(site, model="broken"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image": 5}, "image is 5"),
        ({"image": True}, "image is True"),
        ({"image": {"image": 7}}, "image is 7"),
        ({"image": {"picture": "x"}}, "object with picture"),
        ({"image": {}}, "object with (none)"),
        ({"image": []}, "list of 0"),
        ({"image": [3]}, "list of 1"),
        ({"image": None, "input_image": 5}, "image is 5"),
        ({"mask": 5}, "mask_image is 5"),
        ({"mask_image": True}, "mask_image is True"),
        ({"enabled": "perhaps"}, "enabled"),
        ({"enabled": 2}, "enabled"),
        ({"enabled": []}, "enabled"),
        ({"pixel_perfect": "much"}, "pixel_perfect"),
        ({"weight": True}, "weight"),
        ({"weight": "nan"}, "weight"),
        ({"weight": "inf"}, "weight"),
        ({"weight": []}, "weight"),
        ({"weight": "1e400"}, "weight"),
        ({"guidance_start": -0.1}, "guidance_start"),
        ({"guidance_end": 1.1}, "guidance_end"),
        ({"module": 7}, "module"),
        ({"model": ["canny_1"]}, "model"),
        ({"model": {}}, "model"),
        ({"input_mode": "batch"}, "input_mode"),
        ({"resize_mode": "sideways"}, "resize_mode"),
    ],
)
def test_no_field_of_a_wrong_type_loses_the_unit_in_silence(site: Site, fields: dict[str, Any], words: str) -> None:
    assert words in site.refused({**_unit(site), **fields})


@pytest.mark.parametrize("args", [5, "a text", True, None, [5], [True], [[{}]], {"enabled": True}])
def test_units_are_a_list_of_objects(site: Site, args: Any) -> None:
    body = {"prompt": "x", "steps": 1, "width": SIDE_PX, "height": SIDE_PX, "alwayson_scripts": {"ControlNet": {"args": args}}}
    assert site.client.post("/sdapi/v1/txt2img", json=body).status_code == 422


@pytest.mark.parametrize(
    ("fields", "is_on"),
    [
        ({"enabled": "false"}, False),
        ({"enabled": 0}, False),
        ({"enabled": "True"}, True),
        ({"weight": "1.0"}, True),
        ({"image": [_picture()]}, True),
        ({"image": [_picture(), None]}, True),
        ({"image": {"image": _picture(), "mask": None}}, True),
        ({"input_image": _picture(), "image": None}, True),
    ],
)
def test_words_mean_what_they_say(site: Site, fields: dict[str, Any], is_on: bool) -> None:
    expected = site.known(_unit(site)) if is_on else site.known()
    assert site.txt2img({**_unit(site), **fields})["images"] == expected["images"]


def _file(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def _spot_mask(kind: str) -> str:
    grey = Image.new("L", (160, 128), 3 if kind == "ground" else 0)
    grey.paste(255, (60, 50, 100, 80))
    if kind != "RGBA":
        return _file(grey, "JPEG") if kind == "JPEG" else _file(grey)
    paint = Image.new("RGBA", grey.size, (255, 255, 255, 0))
    paint.putalpha(grey)
    return _file(paint)


MASKED = [{"mask_blur": 4}, {"mask_blur": 0, "inpaint_full_res_padding": 12}, {"mask_blur": 8, "inpainting_mask_invert": 1}]
MASK_KINDS = ("grey", "RGBA", "JPEG", "ground")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        pytest.param(kind, fields, marks=[] if place == number % 3 else [pytest.mark.nightly])  # each once every time, the pairs at night
        for number, kind in enumerate(MASK_KINDS)
        for place, fields in enumerate(MASKED)
    ],
)
def test_the_hint_is_cut_by_the_box_that_the_picture_is_cut_by(
    site: Site, kind: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from modules.processing import img2img

    cut: list[Image.Image] = []
    monkeypatch.setattr(img2img, "pil_to_pixels", lambda pictures: cut.extend(pictures) or pil_to_pixels(pictures))
    picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (128, 160, 3), dtype=np.uint8))
    body = {"init_images": [_file(picture)], "mask": _spot_mask(kind), "prompt": "x", "steps": 1, "width": SIDE_PX, "height": SIDE_PX}
    body |= {"inpaint_full_res": True, "inpainting_fill": 1, **fields, "alwayson_scripts": {"ControlNet": {"args": [{"model": "canny_1"}]}}}
    answer = site.post("/sdapi/v1/img2img", body)
    assert np.array_equal(_pixels(answer["images"][1]), np.asarray(cut[0]))


@pytest.mark.parametrize("mode", [0, 1])
def test_the_hint_follows_the_resize_mode_of_img2img(site: Site, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.fromarray(np.random.default_rng(5).integers(1, 255, (96, 160, 3), dtype=np.uint8))
    hints: list[Any] = []
    fitted = sys.modules["lib_controlnet.hints"].fit
    monkeypatch.setattr(sys.modules["lib_controlnet.hints"], "fit", lambda *args: hints.append(fitted(*args)) or hints[-1])
    body = {"init_images": [_file(picture)], "resize_mode": mode, "prompt": "x", "steps": 1, "width": SIDE_PX, "height": SIDE_PX}
    site.post("/sdapi/v1/img2img", {**body, "alwayson_scripts": {"ControlNet": {"args": [{"model": "canny_1"}]}}})
    assert np.array_equal(hints[0], np.asarray(resize_by_mode(mode, picture, SIDE_PX, SIDE_PX)))


def test_pictures_of_units_are_read_as_img2img_reads_its_own(site: Site) -> None:
    """Rotated per EXIF, 16 bits scaled, palette transparency and hidden colors under alpha composited on white."""
    greys = np.arange(SIDE_PX * SIDE_PX, dtype=np.uint16).reshape(SIDE_PX, SIDE_PX) * 16
    colors = Image.fromarray(np.random.default_rng(6).integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    hidden = colors.convert("RGBA")
    hidden.putalpha(0)
    palette = Image.new("P", (SIDE_PX, SIDE_PX), 0)
    palette.putpalette([200, 0, 0] * 256)
    white = np.full((SIDE_PX, SIDE_PX, 3), 255)
    for text, expected in (
        (_file(Image.fromarray(greys)), np.rint(greys / 257)[..., None].repeat(3, axis=2)),
        (_file(Image.fromarray(greys), "TIFF"), np.rint(greys / 257)[..., None].repeat(3, axis=2)),
        (_file(colors, exif=exif), np.asarray(colors.transpose(Image.Transpose.ROTATE_270))),
        (_file(hidden), white),
        (_file(palette, transparency=0), white),
    ):
        answer = site.txt2img({**_unit(site), "module": "None", "image": text}, steps=1)
        assert np.array_equal(_pixels(answer["images"][1]), expected)
        detected = site.post(
            "/controlnet/detect", {"controlnet_module": "none", "controlnet_input_images": [text], "controlnet_processor_res": SIDE_PX}
        )
        assert np.array_equal(_pixels(detected["images"][0]), expected)


def test_a_model_of_another_family_is_refused_with_both_names(site: Site) -> None:
    message = site.refused(_unit(site, model="big"))
    assert "big.safetensors does not fit the checkpoint" in message and "SDXL" in message
    guided = site.txt2img(_unit(site, model="big"), override_settings={"sd_model_checkpoint": "sdxl.safetensors"})
    assert len(guided["images"]) == 2


def test_a_union_is_told_the_kind_of_hint(site: Site) -> None:
    sdxl = {"override_settings": {"sd_model_checkpoint": "sdxl.safetensors"}, "steps": 2}
    by_name = [site.txt2img(_unit(site, model="union", union_control_type=kind), **sdxl) for kind in ("Depth", "openpose")]
    by_module = site.txt2img(_unit(site, model="union"), **sdxl)
    by_number = site.txt2img(_unit(site, model="union", union_control_type=3), **sdxl)
    assert np.array_equal(_first(by_module), _first(by_number))
    assert not np.array_equal(_first(by_name[0]), _first(by_name[1])) and not np.array_equal(_first(by_name[0]), _first(by_module))
    assert "Union Control Type: Hard Edge" in json.loads(by_module["info"])["extra_generation_params"]["ControlNet 0"]
    assert "Send union_control_type" in site.refused(_unit(site, model="union", module="None"), **sdxl)
    assert "union_control_type" in site.refused(_unit(site, model="union", union_control_type="sideways"), **sdxl)


def test_reference_only_needs_no_model_and_leaves_nothing_behind(site: Site) -> None:
    plain = _first(site.known(steps=2))
    unit = {"module": "Reference_Only", "image": _picture(3), "weight": 30.0}  # a random network pays little attention
    guided = site.txt2img(unit, steps=2)
    assert np.abs(_first(guided) - plain).max() > 2 and len(guided["images"]) == 2
    assert not np.array_equal(_first(guided), _first(site.txt2img({**unit, "threshold_a": 1.0}, steps=2)))
    never = site.txt2img({**unit, "guidance_start": 1.0, "guidance_end": 1.0}, steps=2)
    assert np.abs(_first(never) - plain).max() <= 1  # the same arithmetic, layer by layer
    assert np.array_equal(_first(site.txt2img(steps=2)), plain)
    assert len(site.txt2img(unit, _unit(site), steps=2)["images"]) == 3


def test_an_ip_adapter_asks_for_its_image_encoder_and_then_sees_the_picture(site: Site) -> None:
    unit = {"module": "CLIP-ViT-H", "model": "ip-adapter", "image": _picture(3)}
    message = site.refused(unit)
    folder = Path(shared.preprocessor_dir)
    assert "ip-adapter.safetensors needs the image encoder" in message and str(folder) in message
    write_tower(folder / "clip_vision" / "any.safetensors", build_tower())
    plain, guided = _first(site.known(steps=2)), site.txt2img(unit, steps=2)
    assert np.abs(_first(guided) - plain).max() > 2 and len(guided["images"]) == 2
    assert not np.array_equal(_first(guided), _first(site.txt2img({**unit, "image": _picture(4)}, steps=2)))
    assert not np.array_equal(_first(guided), _first(site.txt2img({**unit, "weight": 0.5, "module": "none"}, steps=2)))
    assert np.array_equal(_first(site.txt2img(steps=2)), plain)
    assert "does not fit the checkpoint" in site.refused(unit, override_settings={"sd_model_checkpoint": "sdxl.safetensors"})


_UNITS: list[dict[str, Any]] = [
    {"model": "canny_1", "module": "None"},
    {"model": "ip-adapter", "module": "CLIP-ViT-H"},
    {"module": "reference_only"},
]


@pytest.mark.parametrize("unit", _UNITS)
def test_a_unit_without_picture_takes_each_initial_picture_of_a_batch_for_itself(site: Site, unit: dict[str, Any]) -> None:
    write_tower(Path(shared.preprocessor_dir) / "clip_vision" / "any.safetensors", build_tower())
    pictures = [_picture(3), _file(Image.new("RGB", (SIDE_PX, SIDE_PX), (250, 250, 0)))]
    body = {"prompt": "x", "seed": 1, "steps": 3, "width": SIDE_PX, "height": SIDE_PX, "denoising_strength": 0.8, "init_images": pictures}

    def run(maps: int, **fields: Any) -> list[np.ndarray]:
        units = {"ControlNet": {"args": [{**unit, **fields}]}}
        return [_pixels(text) for text in site.post("/sdapi/v1/img2img", {**body, "batch_size": 2, "alwayson_scripts": units})["images"]][-2 - maps :]

    own = run(2)
    for place, picture in enumerate(pictures):
        given = run(1, image=picture)
        same, other = (np.abs(own[row] - given[row]).mean() for row in (place, 1 - place))
        assert same < 0.001 and other > 0.01
        assert np.array_equal(own[2 + place], given[2])


def test_a_control_lora_is_a_model_like_others(site: Site) -> None:
    plain, guided = site.known(steps=2), site.txt2img(_unit(site, model="control-lora"), steps=2)
    assert not np.array_equal(_first(plain), _first(guided))
    assert "Union" not in json.loads(guided["info"])["extra_generation_params"]["ControlNet 0"]
    assert "control-lora.safetensors does not fit" in site.refused(
        _unit(site, model="control-lora"), override_settings={"sd_model_checkpoint": "sdxl.safetensors"}
    )


def test_linked_folders_are_listed_and_windows_names_are_understood(site: Site, tmp_path: Path) -> None:
    from lib_controlnet import global_state  # in sys.modules since the extension was loaded

    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "far_scribble.safetensors").write_bytes(b"no model")
    link = site.app.config.controlnet_dirs[0] / "link"
    link.symlink_to(tmp_path)
    try:
        for name in ("link\\deep\\far_scribble.safetensors", "LINK\\far_scribble", "far_scribble [0123456789]"):
            global_state.update_controlnet_filenames()
            assert Path(global_state.get_controlnet_filename(name) or "").name == "far_scribble.safetensors"
        with pytest.raises(RequestError, match="nearest are 'far_scribble "):
            global_state.load_model("sub\\far_scribbel.safetensors", keep=1)
    finally:
        link.unlink()
        global_state.update_controlnet_filenames()


def test_lists(site: Site) -> None:
    assert set(site.titles) == {"canny_1", "canny_2", "big", "broken", "union", "control-lora", "ip-adapter"}
    modules = site.client.get("/controlnet/module_list").json()
    assert modules["module_list"][0] == "None" and {"canny", "shuffle", "inpaint_only"} <= set(modules["module_list"])
    assert modules["module_detail"]["canny"]["sliders"][1] == {"name": "Low Threshold", "value": 100, "min": 0, "max": 256, "step": 1}
    types = site.client.get("/controlnet/control_types").json()["control_types"]
    assert types["Canny"]["default_option"] == "canny" and types["Canny"]["default_model"] == site.titles["canny_1"]
    assert types["IP-Adapter"]["default_model"] == site.titles["ip-adapter"] and types["Reference"]["default_option"] == "reference_only"
    assert types["All"]["default_option"] == "None" and len(types["All"]["model_list"]) == 8
    assert site.client.get("/controlnet/version").json() == {"version": 2}
    assert site.client.get("/controlnet/settings").json() == {"control_net_unit_count": 3}


def test_clients_are_told_of_the_scripts_arguments(site: Site) -> None:
    info = site.client.get("/sdapi/v1/script-info").json()
    found = [one for one in info if one["name"] == "controlnet"]
    assert [len(one["args"]) for one in found] == [3, 3] and all(one["is_alwayson"] for one in found)
    assert found[0]["args"][0]["value"]["enabled"] is False


def test_detect(site: Site) -> None:
    done = site.post(
        "/controlnet/detect", {"controlnet_module": "Canny", "controlnet_input_images": [_picture()] * 2, "controlnet_processor_res": 128}
    )
    assert done["info"] == "Success" and [_pixels(text).shape for text in done["images"]] == [(128, 128, 3)] * 2
    assert site.post("/controlnet/detect", {"controlnet_input_images": [_picture()]})["info"] == "Success"
    for body in ({"controlnet_module": "canny"}, {"controlnet_module": "zoom", "controlnet_input_images": [_picture()]}):
        assert site.client.post("/controlnet/detect", json=body).status_code == 422
    for number in ("NaN", "Infinity", "-Infinity"):
        text = f'{{"controlnet_module": "canny", "controlnet_input_images": ["{_picture()}"], "controlnet_threshold_a": {number}}}'
        assert site.client.post("/controlnet/detect", content=text, headers={"Content-Type": "application/json"}).status_code == 422


def test_the_page_has_three_units_in_both_tabs(site: Site) -> None:
    for tab, runner in site.app.script_runners.items():
        with gr.Blocks(analytics_enabled=False) as blocks:
            runner.prepare_ui()
            runner.setup_ui()
        ids = {getattr(block, "elem_id", None) for block in blocks.blocks.values()}
        for number in range(3):
            names = ("enable_checkbox", "preprocessor_dropdown", "model_dropdown", "control_weight_slider", "control_mode_radio", "resize_mode_radio")
            assert {f"{tab}_controlnet_ControlNet-{number}_controlnet_{name}" for name in names} <= ids
        assert {f"{tab}_controlnet", f"{tab}_controlnet_ControlNet-0_input_image"} <= ids
    build_controls(site.app)


def test_every_preprocessors_sliders_begin_within_their_bounds(site: Site) -> None:
    from lib_controlnet import global_state  # on sys.modules since the extension was loaded
    from lib_controlnet.ui import _show_sliders

    names = global_state.get_all_preprocessor_names()
    assert len(names) > 10
    for name in names:
        for shown in _show_sliders(name, False):
            if "value" in shown:
                assert shown["minimum"] <= shown["value"] <= shown["maximum"], name


def test_controls_make_units_and_parameters_fill_controls(site: Site) -> None:
    from lib_controlnet.infotext import pasted, read_unit, write_unit  # in sys.modules since the extension was loaded
    from lib_controlnet.ui import make_unit

    image = np.zeros((8, 8, 3), dtype=np.uint8)
    unit = make_unit(True, image, None, "canny", "a, b [12345678]", 0.5, 0.1, 0.9, 512, 50, 60, True, "Balanced", "Just Resize", "Both", "Lineart")
    assert (unit.enabled, unit.module, unit.weight, unit.image is image) == (True, "canny", 0.5, True)
    assert unit.union_control_type.value == "Hard Edge"
    unit.normalise()
    text = write_unit(unit)
    assert read_unit(text)["Model"] == "a, b [12345678]"
    params = {"ControlNet 1": text}
    assert pasted(1, "model", "None")(params) == "a, b [12345678]"
    assert (pasted(1, "weight", 1.0)(params), pasted(1, "pixel_perfect", False)(params)) == (0.5, True)
    assert (pasted(1, "enabled", True)(params), pasted(0, "enabled", True)(params), pasted(0, "weight", 1.0)(params)) == (True, False, None)
