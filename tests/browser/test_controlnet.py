"""The ControlNet panel in a browser: fill in a unit, look at its map, and check that Generate's picture follows it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modules import scripts
from modules.api.api import create_internal_api
from modules.http_edge.server import WebServer, create_fastapi_app, mount_page
from modules.ui.page import page_settings
from modules.ui.tabs import create_ui
from tests.browser.actions import expect_value, expected, generate, infotexts, put_picture
from tests.browser.conftest import Site
from tests.support.applications import installed_application
from tests.support.checkpoints import write_checkpoint
from tests.support.controlnets import build_controlnet, write_controlnet

UNIT = "#txt2img_controlnet_ControlNet-0_"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = Path(tmp_path_factory.mktemp("site"))
    models = write_checkpoint(
        folder / "models/Stable-diffusion/narrow.safetensors", "sd15", is_shallow=True, metadata={"modelspec.resolution": "64x64"}
    )
    write_controlnet(folder / "models/ControlNet/edges.safetensors", build_controlnet(models))
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[16:48, 16:48] = 255
    Image.fromarray(pixels).save(folder / "square.png")
    with installed_application(folder, port=0, controlnet=True) as app:
        scripts.load_scripts(app)
        fastapi_app = create_fastapi_app(app.config)
        create_internal_api(app, fastapi_app)
        mount_page(fastapi_app, create_ui(app), app.config, page_settings(app.config))
        server = WebServer(app.config)
        server.start(fastapi_app)
        try:
            yield Site(app=app, address=server.address)
        finally:
            server.stop()
            scripts.unload_scripts()


def open_unit(page: Any) -> None:
    if not page.locator(f"{UNIT}input_image").is_visible():
        page.get_by_text("ControlNet Unit 0").first.click()


def _choose(page: Any, elem_id: str, text: str) -> None:
    box = page.locator(f"{elem_id} input").first
    box.click()
    box.fill(text)
    page.locator(f"{elem_id} [role=option]", has_text=text).first.click()


def test_a_unit_of_the_panel_guides_the_picture(page: Any, site: Site) -> None:
    open_unit(page)
    put_picture(page, f"{UNIT}input_image", site.app.config.data_dir / "square.png")
    page.check(f"{UNIT}controlnet_enable_checkbox input")
    _choose(page, f"{UNIT}controlnet_preprocessor_dropdown", "canny")
    page.wait_for_selector(f"{UNIT}controlnet_threshold_A_slider", state="visible")
    _choose(page, f"{UNIT}controlnet_model_dropdown", "edges")
    page.click(f"{UNIT}controlnet_trigger_preprocessor")
    page.wait_for_selector(f"{UNIT}generated_image img")  # requested after filling in the unit, so the server has the unit too
    generate(page)
    text = infotexts(page)[0]
    assert 'ControlNet 0: "Module: canny, Model: edges [' in text and "Threshold A: 100, Threshold B: 200" in text
    page.wait_for_function("document.querySelectorAll('#txt2img_gallery button.thumbnail-item, #txt2img_gallery .thumbnails button').length >= 2")


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.nightly)])
def test_the_model_that_a_control_type_brings_is_the_one_that_is_sent(page: Any, site: Site, every: int) -> None:
    """Some types, at night all: what is shown in the end counts, whatever was on its way, and no control sends what its bounds refuse."""
    open_unit(page)
    put_picture(page, f"{UNIT}input_image", site.app.config.data_dir / "square.png")
    page.check(f"{UNIT}controlnet_enable_checkbox input")
    types = page.locator(f"{UNIT}controlnet_type_filter_radio label")
    for index in range(0, types.count(), every):
        types.nth(index).click()
    page.locator(f"{UNIT}controlnet_type_filter_radio label", has_text="Canny").click()
    expect_value(page, f"{UNIT}controlnet_preprocessor_dropdown input", "canny")
    expected(page, f"{UNIT}controlnet_threshold_A_slider input[type=number]").to_have_value("100")
    expect_value(page, f"{UNIT}controlnet_model_dropdown input", re.compile("^edges"))
    page.click(f"{UNIT}controlnet_trigger_preprocessor")
    page.wait_for_selector(f"{UNIT}generated_image img")  # asked for last, so the rest is on the server too
    generate(page)
    assert 'ControlNet 0: "Module: canny, Model: edges [' in infotexts(page)[0]
