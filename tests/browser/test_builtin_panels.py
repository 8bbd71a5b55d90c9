"""One walk over the panels of the built-in extensions, in headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backend.checkpoint_file import open_tensor_file
from modules.application import Application
from tests.browser.actions import expect_number, expected, generate, infotexts, open_page, set_number, show_tab
from tests.browser.conftest import Site, put_checkpoint, serve

FOLDERS = (
    *("sd_forge_dynamic_thresholding", "sd_forge_freeu", "sd_forge_sag", "sd_forge_perturbed_attention", "sd_forge_kohya_hrfix"),
    *("sd_forge_latent_modifier", "sd_forge_multidiffusion", "sd_forge_stylealign", "sd_forge_neveroom", "soft-inpainting"),
    *("extra-options-section", "prompt-bracket-checker", "mobile", "regional_prompts", "training_pictures", "selectable_scripts"),
)


@pytest.fixture(scope="module")
def panels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    data_dir = Path(tmp_path_factory.mktemp("panels"))
    put_checkpoint(data_dir)
    (data_dir / "config.json").write_text('{"extra_options_txt2img": ["eta_noise_seed_delta"]}', encoding="utf-8")
    with serve(data_dir, *FOLDERS) as site:
        yield site


def test_panels_open_act_and_stay_within_the_page(page: Any, panels: Site) -> None:
    open_page(page, panels)
    set_number(page, "txt2img_steps", 2)
    page.click("#extensions-freeu-visible-checkbox")
    set_number(page, "script_txt2img_freeu_integrated_sd_1x_sd_2x_sdxl_b1", 1.5)
    page.click("#script_txt2img_multidiffusion_integrated_accordion button.label-wrap")
    expected(page, "#script_txt2img_multidiffusion_integrated_tile_width").to_be_visible()
    set_number(page, "setting_eta_noise_seed_delta_txt2img", 7)
    page.fill("#txt2img_prompt textarea", "a (red cat")
    expected(page, "#txt2img_token_counter").to_have_attribute("title", "1 round bracket ( without )")
    page.fill("#txt2img_prompt textarea", "a (red) cat \\(sitting")
    expected(page, "#txt2img_token_counter").to_have_attribute("title", "")
    generate(page)
    text = infotexts(page)[0]
    assert "freeu_enabled: True" in text and "freeu_b1: 1.5" in text and "ENSD: 7" in text and "multidiffusion" not in text
    show_tab(page, "img2img")
    page.click("#img2img_inpaint_tab-button")
    page.click("#soft_inpainting_enabled-visible-checkbox")
    expected(page, "#mask_blend_power").to_be_visible()
    show_tab(page, "extras")
    page.click("#extras_flipped_copies-visible-checkbox")
    expected(page, "#postprocess_flip_directions").to_be_visible()
    show_tab(page, "txt2img")
    page.set_viewport_size({"width": 420, "height": 900})
    page.wait_for_function("() => document.querySelector('#txt2img_results').contains(document.querySelector('#txt2img_generate'))")
    page.set_viewport_size({"width": 1440, "height": 900})
    page.wait_for_function("() => document.querySelector('#txt2img_actions_column').contains(document.querySelector('#txt2img_generate'))")
    expect_number(page, "txt2img_steps", 2)
    ids = page.evaluate("() => [...document.querySelectorAll('[id]')].map(element => element.id)")
    of_panels = [one for one in ids if one.startswith(("script_txt2img", "script_img2img", "extensions-", "soft_inpainting", "mask_blend"))]
    assert len(of_panels) == len(set(of_panels))


def test_the_application_knows_all_of_them(panels: Site) -> None:
    app: Application = panels.app
    assert {extension.name for extension in app.extensions if extension.enabled} >= set(FOLDERS)


def test_a_checkpoint_is_converted_on_the_page(page: Any, panels: Site) -> None:
    """Chosen by mouse, with the bar shown while it writes; an existing file is kept, and the new one can be chosen as checkpoint."""
    open_page(page, panels)
    show_tab(page, "checkpoint_tools")
    choose(page, "#checkpoint_tools_files", "narrow.safetensors")
    choose(page, "#checkpoint_tools_type", "nf4")
    page.fill("#checkpoint_tools_name textarea, #checkpoint_tools_name input", "narrow-nf4")
    page.click("#checkpoint_tools_convert")
    expected(page, "#checkpoint_tools_result").to_contain_text("narrow-nf4.safetensors: 0.0")
    target = panels.app.config.ckpt_dirs[0] / "narrow-nf4.safetensors"
    before = target.read_bytes()
    with open_tensor_file(target) as file:
        assert any(info.packed is not None and info.packed.title == "NF4" for info in file.infos.values())
    page.click("#checkpoint_tools_convert")
    expected(page, "#checkpoint_tools_result").to_contain_text("exists already")
    assert target.read_bytes() == before
    assert "narrow-nf4.safetensors" in [info.name for info in panels.app.checkpoints]


def choose(page: Any, dropdown: str, text: str) -> None:
    page.click(f"{dropdown} input")
    page.locator(f"{dropdown} [role=option]", has_text=text).first.click()
    page.keyboard.press("Escape")
