"""The GPUs panel from the user's view: closed at first, filled when opened, and up to date after a job."""

from __future__ import annotations

from typing import Any

from tests.browser.actions import expect_text, expected, generate, open_page, set_number, show_tab
from tests.browser.conftest import Site


def test_the_panel_shows_what_a_job_left_on_the_devices(page: Any, site: Site) -> None:
    site.app.models.unload()
    open_page(page, site)
    expected(page, "#txt2img_gpus_table table").not_to_be_visible()
    page.click("#txt2img_gpus > button")
    page.wait_for_selector("#txt2img_gpus_table table", state="visible")
    expected(page, "#txt2img_gpus_table").not_to_contain_text("KModel")
    set_number(page, "txt2img_steps", 30)  # long enough for the panel to refresh during the job, and once after it
    generate(page)
    expect_text(page, "#txt2img_gpus_table", "KModel")
    show_tab(page, "img2img")
    page.click("#img2img_gpus > button")
    page.wait_for_selector("#img2img_gpus_table table", state="visible")
    expect_text(page, "#img2img_gpus_table", "KModel")
