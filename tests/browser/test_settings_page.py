"""A page arranged by its settings: tabs, quick settings, language, start values; and the pages of Settings and Extensions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modules.settings.inert import WHAT_IS_TRUE
from tests.browser.actions import expect_count, expect_number, expect_text, expected, open_page, set_number, show_tab
from tests.browser.conftest import Observed, Site, put_checkpoint, serve

SETTINGS = {
    "ui_tab_order": ["PNG Info", "Txt2img"],
    "hidden_tabs": ["Checkpoint tools", "Settings"],
    "quick_setting_list": ["samples_save", "jpeg_quality", "unknown"],
    "tabs_without_quick_settings_bar": ["PNG Info"],
    "ui_reorder_list": ["seed"],
    "localization": "pirate",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    data_dir = Path(tmp_path_factory.mktemp("arranged"))
    put_checkpoint(data_dir)
    (data_dir / "config.json").write_text(json.dumps(SETTINGS))
    (data_dir / "localizations").mkdir()
    (data_dir / "localizations" / "pirate.json").write_text(json.dumps({"Generate": "Hoist!", "Sampling steps": "Paces", "Skip": "<b>x</b>"}))
    (data_dir / "ui-config.json").write_text(json.dumps({"txt2img/Sampling steps/value": 7}))
    (data_dir / "index.json").write_text(json.dumps({"extensions": [{"name": "Treasure", "url": "https://a.b/treasure", "description": "gold"}]}))
    (data_dir / "mine" / "scripts").mkdir(parents=True)
    with serve(data_dir) as site:
        yield site


@pytest.fixture(scope="module")
def arranged(profile: Any, site: Site) -> Iterator[Any]:
    """One window for this file: its page starts with another tab than those that `page` expects."""
    window, observed = profile.new_page(), Observed()
    observed.watch(window)
    yield open_page(window, site)
    window.close()
    assert observed.foreign_requests == []
    assert observed.errors == []


def test_tabs_parts_and_quick_settings_are_as_the_settings_say(arranged: Any, site: Site) -> None:
    titles = arranged.locator("#tabs > .tab-wrapper .tab-container:not(.visually-hidden) [role=tab]").all_inner_texts()
    assert titles[:2] == ["PNG Info", "Txt2img"]
    assert "Checkpoint tools" not in titles and "Settings" in titles
    expected(arranged, "#quicksettings").to_be_hidden()  # PNG Info is shown first
    show_tab(arranged, "txt2img")
    expected(arranged, "#quicksettings").to_be_visible()
    first = arranged.evaluate("document.querySelector('#txt2img_settings').firstElementChild.querySelector('[id^=txt2img_seed]') !== null")
    assert first
    arranged.uncheck("#quicksettings_more #setting_samples_save input")
    arranged.wait_for_function("opts.samples_save === false")
    assert json.loads(site.app.config.settings_file.read_text())["samples_save"] is False
    expect_count(arranged, "#setting_samples_save", 1)


def test_the_page_is_in_the_chosen_language_and_starts_with_the_users_values(arranged: Any, site: Site) -> None:
    show_tab(arranged, "txt2img")
    expect_number(arranged, "txt2img_steps", 7)
    expect_text(arranged, "#txt2img_generate", "Hoist!")
    expect_text(arranged, "#txt2img_steps", "Paces")
    assert arranged.evaluate("document.querySelector('#txt2img_skip').textContent.trim()") == "<b>x</b>"  # a text, no element
    assert arranged.evaluate("document.querySelector('#txt2img_steps span[data-testid=block-info]').title") == arranged.evaluate(
        "titles['Sampling steps']"
    )


def test_changed_fields_become_start_values(arranged: Any, site: Site) -> None:
    show_tab(arranged, "txt2img")
    set_number(arranged, "txt2img_cfg_scale", 3.5)
    show_tab(arranged, "settings")
    arranged.click("#settings_tab_defaults-button")
    arranged.click("#ui_defaults_view")
    expect_text(arranged, "#ui_defaults_review", "txt2img/CFG Scale", "3.5")
    arranged.click("#ui_defaults_apply")
    expect_text(arranged, "#ui_defaults_review", "Written to ui-config.json")
    kept = json.loads((site.app.config.data_dir / "ui-config.json").read_text())
    assert kept["txt2img/CFG Scale/value"] == 3.5 and kept["txt2img/Sampling steps/value"] == 7


def test_settings_are_found_and_the_machine_and_licenses_are_told(arranged: Any, site: Site) -> None:
    show_tab(arranged, "settings")
    arranged.fill("#settings_search input, #settings_search textarea", "lossless")
    arranged.locator(".settings-hits button").first.click()
    arranged.wait_for_selector("#setting_webp_lossless.found-setting")
    arranged.click("#settings_tab_licenses-button")
    expect_text(arranged, "#licenses", "gradio", "pillow")
    arranged.click("#settings_tab_sysinfo-button")
    with arranged.expect_download() as download:
        arranged.click("#sysinfo_download")
    assert "Platform" in json.loads(Path(download.value.path()).read_text())


def test_an_extension_is_found_in_an_index_and_installed_from_a_folder(arranged: Any, site: Site) -> None:
    show_tab(arranged, "extensions")
    arranged.click("#extensions_available_tab-button")
    arranged.fill("#extensions_index_url input, #extensions_index_url textarea", "index.json")
    arranged.click("#available_extensions_load")
    expect_text(arranged, "#available_extensions", "Treasure", "gold")
    arranged.click("#extensions_install_tab-button")
    arranged.fill("#extension_to_install input, #extension_to_install textarea", str(site.app.config.data_dir / "mine"))
    arranged.click("#install_extension_button")
    expect_text(arranged, "#extension_install_result", "Installed into")
    assert (site.app.config.extensions_dir / "mine" / "scripts").is_dir()
    arranged.click("#extensions_backup_tab-button")
    arranged.click("#extension_backup_save")
    expected(arranged, "#extension_backup_result").to_contain_text(re.compile(r"Saved as .*\.json"))


@pytest.mark.nightly  # hundreds of controls at once; tests/modules/ui/test_settings.py looks at each without a browser
def test_all_settings_are_shown_at_once_and_each_acts(arranged: Any, site: Site) -> None:
    show_tab(arranged, "settings")
    arranged.click("#settings_show_all_pages")
    arranged.wait_for_selector("#settings.all-settings", timeout=120_000)
    shown = arranged.evaluate("Array.from(document.querySelectorAll('#settings [id^=setting_]'), element => element.id.replace('setting_', ''))")
    assert len(shown) > 150
    assert sorted(set(shown) & set(WHAT_IS_TRUE)) == []
    arranged.click("#settings_show_one_page")
    expect_count(arranged, "#settings.all-settings", 0)
