from __future__ import annotations

import inspect
import re
from pathlib import Path

import gradio as gr
import pytest

from modules.app_config import SCRIPT_DIR
from modules.launch.cmd_args import config_for_tests
from modules.ui import page

SVG_NAMESPACE = "http://www.w3.org/2000/svg"  # the name of a file format, never fetched


def addresses_in(text: str) -> set[str]:
    return set(re.findall(r"https?://[^\s\"')]+", text))


def test_settings_fit_both_ways_of_serving(tmp_path: Path) -> None:
    names = set(page.page_settings(config_for_tests(tmp_path)))
    assert names <= set(inspect.signature(gr.Blocks.launch).parameters)
    assert names <= set(inspect.signature(gr.mount_gradio_app).parameters)


@pytest.mark.parametrize("name", [*page.THEMES, "no such theme"])
def test_no_theme_asks_another_host_for_fonts(name: str) -> None:
    theme = page.create_theme(name)
    assert addresses_in(theme._get_theme_css()) <= {SVG_NAMESPACE}
    assert theme._stylesheets == []


def test_style_sheet_and_scripts_name_no_other_host(tmp_path: Path) -> None:
    config = config_for_tests(tmp_path)
    text = page.style_text(config) + page.head_html(config)
    assert addresses_in(text) <= {SVG_NAMESPACE}


def test_scripts_run_in_the_order_that_they_need(tmp_path: Path) -> None:
    names = [path.name for path in page.script_files(SCRIPT_DIR / "javascript")]
    assert names[0] == "core.js"
    assert names[1:] == sorted(names[1:])


def test_script_that_would_end_its_own_tag_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.js").write_text("let x = '</script>';")
    with pytest.raises(ValueError, match=r"bad\.js"):
        page.head_html(config_for_tests(tmp_path), tmp_path)


def test_users_own_style_comes_last(tmp_path: Path) -> None:
    (tmp_path / "user.css").write_text("#mine { color: red; }")
    assert page.style_text(config_for_tests(tmp_path)).endswith("#mine { color: red; }")


def test_theme_flag_reaches_the_page(tmp_path: Path) -> None:
    assert 'window.webuiTheme = "dark"' in page.head_html(config_for_tests(tmp_path, theme="dark"))


def test_scripts_define_the_names_that_extensions_use(tmp_path: Path) -> None:
    text = page.head_html(config_for_tests(tmp_path))
    functions = (
        "gradioApp onUiLoaded onUiUpdate onAfterUiUpdate onUiTabChange onOptionsChanged onOptionsAvailable get_uiCurrentTab get_uiCurrentTabContent "
        "updateInput onEdit submit submit_img2img create_submit_args requestProgress randomId request setRandomSeed localSet localGet localRemove "
        "inputAccordionChecked selected_gallery_index all_gallery_buttons extract_image_from_gallery "
        "switch_to_txt2img switch_to_img2img switch_to_inpaint"
    )
    for name in functions.split():
        assert f"function {name}(" in text, name
    assert "var opts = {}" in text
    assert "var uiCurrentTab = " in text


def test_a_sheet_that_is_not_utf8_or_no_file_costs_only_its_own_letters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "user.css").write_bytes(b"/* caf\xe9 */ body { color: red }")
    (tmp_path / "folder.css").mkdir()
    text = page.style_text(config_for_tests(tmp_path), more_sheets=[tmp_path / "folder.css", tmp_path / "none.css"])
    assert text.endswith("/* caf\N{REPLACEMENT CHARACTER} */ body { color: red }")
    assert "user.css is not UTF-8" in caplog.text
