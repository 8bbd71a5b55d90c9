"""The GPUs panel as a user meets it: closed at first, filled when opened, and up to date after a job."""

from __future__ import annotations

from typing import Any

from tests.browser.conftest import Site
from tests.browser.test_page import generate, open_page, set_number, show_tab


def test_the_panel_shows_what_a_job_left_on_the_devices(page: Any, site: Site) -> None:
    site.app.models.unload()
    open_page(page, site)
    assert not page.is_visible("#txt2img_gpus_table table")
    page.click("#txt2img_gpus > button")
    page.wait_for_selector("#txt2img_gpus_table table", state="visible")
    assert "KModel" not in page.inner_text("#txt2img_gpus_table")
    set_number(page, "txt2img_steps", 30)  # long enough that the panel is refreshed meanwhile, and once after
    generate(page)
    page.wait_for_function("document.querySelector('#txt2img_gpus_table').innerText.includes('KModel')")
    show_tab(page, "img2img")
    page.click("#img2img_gpus > button")
    page.wait_for_selector("#img2img_gpus_table table", state="visible")
    assert "KModel" in page.inner_text("#img2img_gpus_table")
