"""Units for transformers in a real application: ControlNets of Flux.1, SD3 and Z-Image, Redux and IP-Adapter of Flux.1, as clients send them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from modules.scripts import callbacks
from modules.scripts.without_page import build_controls
from tests.extensions_builtin.test_controlnet import Site, _first, _picture
from tests.support.applications import installed_application
from tests.support.dit_controlnets import make_sd3_controlnet, make_zimage_controlnet, write_controlnet
from tests.support.flux_checkpoints import write_flux
from tests.support.flux_controlnets import make_controlnet, write_flux_controlnet
from tests.support.flux_pictures import adapter_tables, make_redux, make_siglip, siglip_tensors, write, xlabs_tensors
from tests.support.ip_adapters import build_tower, write_tower
from tests.support.sd3_networks import write_sd3
from tests.support.zimage_networks import write_zimage

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

UNITS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux_canny": ("flux", {"module": "canny"}),
    "flux_redux": ("flux", {"module": "SigLIP (Redux)"}),
    "flux_ip": ("flux", {"module": "CLIP-ViT-L (IPAdapter)", "weight": 2.0}),
    "sd3_pose": ("sd3", {}),
    "zimage_union": ("zimage", {}),
}
"""Models with the checkpoint that they are for."""


def _square(first: int, end: int) -> str:
    """A white square on black."""
    values = np.zeros((64, 64), dtype=np.uint8)
    values[first:end, first:end] = 255
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("dit")
    memory_management.configure(BackendConfig(), probe_devices(BackendConfig(device_ids=("cpu",))))
    write_flux(folder, "all-in-one")
    for name, writer in (("sd3", write_sd3), ("zimage", write_zimage)):
        writer(folder, "all-in-one", name=name)
    models_dir = folder / "models" / "ControlNet"
    write_flux_controlnet(models_dir / "flux_canny.safetensors", make_controlnet("InstantX"), "InstantX")
    write(models_dir / "flux_redux.safetensors", make_redux().state_dict())
    write(models_dir / "flux_ip.safetensors", xlabs_tensors(adapter_tables()))
    write_controlnet(models_dir / "sd3_pose.safetensors", make_sd3_controlnet("InstantX").state_dict())
    write_controlnet(models_dir / "sd3_inpaint.safetensors", make_sd3_controlnet("inpainting").state_dict())
    write_controlnet(models_dir / "zimage_union.safetensors", make_zimage_controlnet("2.1").state_dict())
    _write_towers(folder / "models" / "ControlNetPreprocessor")
    with installed_application(folder, api=True) as app:
        app.options.live_previews_enable = False
        app.options.set("sd_model_checkpoint", "flux.safetensors")
        scripts.load_scripts(app)
        build_controls(app)
        fastapi_app = FastAPI()
        create_api(app, fastapi_app)
        callbacks.app_started_callback(None, fastapi_app)
        with TestClient(fastapi_app) as client:
            listed = client.get("/controlnet/model_list").json()["model_list"]
            yield Site(app, client, {title.split(" [")[0]: title for title in listed})
    scripts.unload_scripts()


def _write_towers(folder: Path) -> None:
    write_tower(folder / "clip_l.safetensors", build_tower())
    write(folder / "siglip.safetensors", siglip_tensors(make_siglip()))


def _on(checkpoint: str) -> dict[str, Any]:
    return {"override_settings": {"sd_model_checkpoint": checkpoint}, "cfg_scale": 3, "negative_prompt": "dark"}


@pytest.mark.parametrize("model", UNITS)
def test_a_unit_changes_the_picture(site: Site, model: str) -> None:
    checkpoint, fields = UNITS[model]
    unit = {"image": _picture(), "model": site.titles[model], **fields}
    plain, guided = _first(site.known(**_on(checkpoint))), _first(site.txt2img(unit, **_on(checkpoint)))
    assert np.abs(plain - guided).max() > 2
    assert np.array_equal(plain, _first(site.txt2img({**unit, "weight": 0.0}, **_on(checkpoint))))
    assert np.array_equal(plain, _first(site.txt2img({**unit, "enabled": False}, **_on(checkpoint)))), "nothing is left in the model"


@pytest.mark.parametrize("model", ["sd3_pose", "zimage_union"])
def test_the_control_mode_is_known(site: Site, model: str) -> None:
    checkpoint, fields = UNITS[model]
    unit = {"image": _picture(), "model": site.titles[model], **fields}
    modes = [_first(site.txt2img({**unit, "control_mode": mode}, **_on(checkpoint))) for mode in (0, 1, 2)]
    assert all(np.abs(modes[0] - other).max() > 0 for other in modes[1:]) and np.abs(modes[1] - modes[2]).max() > 0


@pytest.mark.parametrize(("model", "checkpoint"), [("sd3_inpaint", "sd3"), ("zimage_union", "zimage")])
def test_a_mask_makes_an_inpainting_unit_act(site: Site, model: str, checkpoint: str) -> None:
    unit = {"image": _picture(), "mask_image": _square(16, 48), "model": site.titles[model], "module": "inpaint_global_harmonious"}
    filled = _first(site.txt2img(unit, **_on(checkpoint)))
    assert np.abs(filled - _first(site.known(**_on(checkpoint)))).max() > 2


def test_what_does_not_fit_is_refused_before_the_first_step(site: Site) -> None:
    hint = {"image": _picture()}
    for model, checkpoint, message in (
        ("flux_redux", "sd3", "is Redux for Flux.1, but the checkpoint in use is not"),
        ("flux_ip", "zimage", "is an IP-Adapter for Flux.1, but the checkpoint in use is not"),
        ("sd3_pose", "flux", "is a ControlNet for SD 3, but the checkpoint in use is not"),
        ("zimage_union", "sd3", "is a ControlNet for Z-Image, but the checkpoint in use is not"),
        ("sd3_inpaint", "sd3", "is for inpainting, but its hint has no part to fill"),
    ):
        said = site.refused({**hint, "model": site.titles[model]}, **_on(checkpoint))
        assert message in said and model in said
