"""Cards of LoRA files, checkpoints and embeddings, used in headless Chromium like a user would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.browser.actions import expect_value, generate, infotexts, set_number
from tests.browser.conftest import Site, put_checkpoint, serve


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    data_dir = Path(tmp_path_factory.mktemp("cards"))
    put_checkpoint(data_dir)
    loras = data_dir / "models" / "Lora"
    for name, colour in (("outline", "#2563eb"), ("people/face", "#db2777"), ("people/old/hat", None)):
        path = loras / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        down, up = torch.full((1, 4), 0.1), torch.full((4, 1), 0.1)
        layer = "lora_unet_time_embed_0"
        save_file({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, path, metadata={"ss_output_name": path.stem})
        if colour:
            Image.new("RGB", (160, 220), colour).save(path.with_suffix(".png"))
    (loras / "outline.json").write_text(json.dumps({"description": "Outlines <i>instead</i> of filled shapes", "activation text": "outlined"}))
    with serve(data_dir, "sd_forge_lora") as site:
        yield site


def show_cards(page: Any, name: str, tab: str = "txt2img") -> None:
    page.click(f"#{tab}_{name}-button")
    page.wait_for_selector(f"#{tab}_{name}_cards > *", state="visible")


def expect_names(page: Any, *wanted: str) -> None:
    """The cards that are shown, in their order."""
    script = "() => Array.from(document.querySelectorAll('#txt2img_lora_cards > .card:not(.hidden-part)'), card => card.dataset.name).join()"
    page.wait_for_function(f"wanted => ({script})() === wanted", arg=",".join(wanted))


def expect_prompt(page: Any, text: str) -> None:
    expect_value(page, "#txt2img_prompt textarea", text)


def test_a_card_goes_into_the_prompt_and_out_again(page: Any, site: Site, tmp_path: Path) -> None:
    page.fill("#txt2img_prompt textarea", "a cat")
    show_cards(page, "lora")
    expect_names(page, "outline", "face", "hat")
    page.wait_for_function("Array.from(document.querySelectorAll('#txt2img_lora_cards img')).every(image => image.naturalWidth > 0)")
    page.screenshot(path=str(tmp_path / "cards.png"))
    page.click("#txt2img_lora_cards [data-name=outline]")
    expect_prompt(page, "a cat <lora:outline:1> outlined")
    page.click("#txt2img_lora_cards [data-name=face]")
    page.click("#txt2img_lora_cards [data-name=outline]")
    expect_prompt(page, "a cat <lora:face:1>")
    page.fill("#txt2img_lora_extra_search", "old")
    expect_names(page, "hat")
    page.fill("#txt2img_lora_extra_search", "")
    page.click("#txt2img_lora_tree [data-folder=people]")
    expect_names(page, "face", "hat")
    page.click("#txt2img_lora_extra_sort_name")
    page.click("#txt2img_lora_extra_sort_dir")
    page.click("#txt2img_lora_tree [data-folder='']")
    expect_names(page, "outline", "hat", "face")
    page.click("#txt2img_generation_tab-button")
    set_number(page, "txt2img_steps", 1)
    generate(page)
    assert "<lora:face:1>" in infotexts(page)[0]


def test_what_is_written_shows_on_the_card_and_new_files_after_a_refresh(page: Any, site: Site) -> None:
    page.fill("#txt2img_prompt textarea", "")
    show_cards(page, "lora")
    page.hover("#txt2img_lora_cards [data-name=face]")
    page.click("#txt2img_lora_cards [data-name=face] .edit-button")
    page.wait_for_selector("#txt2img_lora_edit_user_metadata_box", state="visible")
    page.fill("#txt2img_lora_edit_user_metadata_description textarea", "a kind face")
    page.fill("#txt2img_lora_edit_user_metadata_activation_text textarea", "smiling")
    page.click("#txt2img_lora_edit_user_metadata_save")
    page.wait_for_function("(document.querySelector('#txt2img_lora_cards [data-name=face] .description') || {}).textContent === 'a kind face'")
    page.click("#txt2img_lora_edit_user_metadata_close")
    page.click("#txt2img_lora_cards [data-name=face]")
    expect_prompt(page, "<lora:face:1> smiling")
    page.hover("#txt2img_lora_cards [data-name=face]")
    page.click("#txt2img_lora_cards [data-name=face] .metadata-button")
    page.wait_for_function("(document.querySelector('.extra-network-metadata') || {textContent: ''}).textContent.includes('ss_output_name')")
    page.keyboard.press("Escape")
    root = site.app.config.lora_dirs[0]
    (root / "late.safetensors").write_bytes((root / "outline.safetensors").read_bytes())
    page.click("#txt2img_lora_extra_refresh")
    page.wait_for_selector("#txt2img_lora_cards [data-name=late]")


def test_a_checkpoint_is_chosen_by_its_card(page: Any, site: Site) -> None:
    folder = site.app.config.ckpt_dirs[0]
    (folder / "second.safetensors").write_bytes((folder / "narrow.safetensors").read_bytes())
    show_cards(page, "checkpoints")
    page.click("#txt2img_checkpoints_extra_refresh")
    page.click("#txt2img_checkpoints_cards [data-name='second.safetensors']")
    page.wait_for_function("document.querySelector('#setting_sd_model_checkpoint input').value.startsWith('second')")
    assert site.app.options.sd_model_checkpoint.startswith("second")
