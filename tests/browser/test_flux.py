"""Flux.1 on the page: choosing its checkpoint brings its preset, sliders and counter; its other files are chosen; its infotext comes back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.actions import expect_number, expected, generate, infotexts, set_number
from tests.browser.conftest import Site, put_checkpoint, serve
from tests.support.flux_checkpoints import write_flux

SLIDERS = ("txt2img_distilled_cfg_scale", "img2img_distilled_cfg_scale")
MODULES = ("ae", "clip_l", "t5xxl_fp16")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    data_dir = Path(tmp_path_factory.mktemp("site"))
    put_checkpoint(data_dir)
    write_flux(data_dir, "original", name="flux")
    with serve(data_dir) as site:
        site.app.options.sd_model_checkpoint = "narrow"
        yield site


def choose_checkpoint(page: Any, name: str) -> None:
    page.click("#setting_sd_model_checkpoint input")
    page.fill("#setting_sd_model_checkpoint input", name)
    page.locator("#setting_sd_model_checkpoint [role=option]", has_text=name).first.click()


def wait_for_preset(page: Any, preset: str) -> None:
    page.wait_for_function("(preset) => document.querySelector('#forge_ui_preset input:checked').value === preset", arg=preset)


def choose_module(page: Any, name: str) -> None:
    page.click("#setting_forge_additional_modules input")
    page.fill("#setting_forge_additional_modules input", name)
    page.locator("#setting_forge_additional_modules [role=option]", has_text=name).first.click()
    page.wait_for_function("(name) => document.querySelector('#setting_forge_additional_modules').innerText.includes(name)", arg=name)


def wait_until_shown(page: Any, elem_id: str, *, shown: bool) -> None:
    page.wait_for_selector(f"#{elem_id}", state="visible" if shown else "hidden")


def wait_for_text(page: Any, selector: str, pattern: str) -> None:
    page.wait_for_function("([selector, pattern]) => new RegExp(pattern).test(document.querySelector(selector).innerText)", arg=[selector, pattern])


def test_a_flux_checkpoint_from_choice_to_picture_and_back(page: Any, site: Site, tmp_path: Path) -> None:
    wait_for_preset(page, "sd")
    wait_until_shown(page, SLIDERS[0], shown=False)
    choose_checkpoint(page, "flux")
    wait_for_preset(page, "flux")
    wait_until_shown(page, SLIDERS[0], shown=True)
    wait_for_text(page, "#txt2img_negative_token_counter", r"^\d/255")
    expect_number(page, SLIDERS[0], 3.5)
    expect_number(page, "txt2img_cfg_scale", 1)
    expect_number(page, "txt2img_width", 896)
    expected(page, "#txt2img_sampling input").to_have_value("Euler")
    expected(page, "#txt2img_scheduler input").to_have_value("Simple")
    expected(page, "#txt2img_width input[type=range]").to_have_attribute("step", "16")

    page.fill("#txt2img_prompt textarea", "a photo of a cat")
    wait_for_text(page, "#txt2img_token_counter", r"^7/255")
    for side in ("width", "height"):
        set_number(page, f"txt2img_{side}", 64)
    set_number(page, "txt2img_steps", 2)
    generate(page)
    missing = page.inner_text("#html_log_txt2img")
    assert re.search(r"flux\.safetensors needs a CLIP-L text encoder, a T5-XXL text encoder and a VAE", missing), missing
    assert "t5xxl_fp16.safetensors (9.5 GB) into models/text_encoder" in missing

    for name in MODULES:
        choose_module(page, name)
    set_number(page, SLIDERS[0], 4.2)
    set_number(page, "txt2img_seed", 7)
    generate(page)
    (text,) = infotexts(page)
    assert "Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 4.2, Seed: 7, Size: 64x64" in text
    assert text.endswith(", ".join(f"Module {place}: {name}" for place, name in enumerate(MODULES, start=1)))
    page.screenshot(path=tmp_path / "flux.png")

    set_number(page, SLIDERS[0], 2)
    page.fill("#txt2img_prompt textarea", text)
    page.click(".txt2img-paste")
    expect_number(page, SLIDERS[0], 4.2)
    expect_number(page, "txt2img_seed", 7)

    choose_checkpoint(page, "narrow")
    wait_for_preset(page, "sd")
    wait_until_shown(page, SLIDERS[0], shown=False)
    expect_number(page, "txt2img_cfg_scale", 7)
    page.wait_for_function("!document.querySelector('#setting_forge_additional_modules').innerText.includes('t5xxl')")
    wait_for_text(page, "#txt2img_negative_token_counter", r"^\d/75")
    page.fill("#txt2img_prompt textarea", "a photo of a cat ")
    wait_for_text(page, "#txt2img_token_counter", r"^5/75")


def test_the_preset_brings_back_checkpoint_and_files(page: Any, site: Site) -> None:
    page.click("#forge_ui_preset input[value=flux]")
    page.wait_for_function("document.querySelector('#setting_sd_model_checkpoint input').value.startsWith('flux')")
    wait_for_text(page, "#setting_forge_additional_modules", "t5xxl")
    wait_until_shown(page, SLIDERS[0], shown=True)
    expect_number(page, SLIDERS[0], 3.5)
