"""The page from the user's view, in headless Chromium, with a small model behind it."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modules.pictures.metadata import read_info_from_image
from tests.browser.actions import (
    clear_picture,
    expect_count,
    expect_number,
    expect_text,
    expect_value,
    expected,
    generate,
    infotexts,
    newest_picture,
    open_page,
    paint,
    put_picture,
    set_number,
    show_img2img,
    show_tab,
    shown_picture,
    start_over,
    wait_for_answer,
    wait_for_picture_on_canvas,
    wait_until_drawn,
    wait_until_loaded,
)
from tests.browser.conftest import Observed, Site, put_checkpoint, remove_checkpoint


def test_prompt_becomes_a_picture(new_page: Any, site: Site) -> None:
    page = open_page(new_page, site)
    expect_number(page, "txt2img_width", 64)
    expect_number(page, "txt2img_height", 64)
    page.fill("#txt2img_prompt textarea", "a photo of a cat")
    page.wait_for_function("document.querySelector('#txt2img_token_counter').textContent.trim() === '5/75'")
    page.fill("#txt2img_neg_prompt textarea", "a dog")
    set_number(page, "txt2img_steps", 6)
    set_number(page, "txt2img_seed", 1234)
    page.click("#txt2img_generate")
    page.wait_for_selector("#txt2img_results .progressDiv")
    page.wait_for_selector("#txt2img_interrupt", state="visible")
    wait_for_answer(page)
    source = shown_picture(page)
    expect_text(page, "#html_info_txt2img", "Seed: 1234")
    text = page.inner_text("#html_info_txt2img")
    assert text.startswith("a photo of a cat\nNegative prompt: a dog\nSteps: 6, Sampler: Euler a")
    assert "Seed: 1234" in text and "Size: 64x64" in text and "Model: narrow" in text
    expect_text(page, "#html_log_txt2img", "Time taken")
    assert infotexts(page) == [text]
    expect_count(page, ".progressDiv, .livePreview", 0)
    saved = newest_picture(site, "txt2img-images")
    assert saved.name in source
    with Image.open(saved) as image:
        assert image.size == (64, 64)
        assert read_info_from_image(image)[0] == text


def test_preview_and_progress_show_while_it_works_and_interrupt_ends_it(page: Any, site: Site) -> None:
    page.fill("#txt2img_prompt textarea", "many steps")
    set_number(page, "txt2img_steps", 150)
    page.click("#txt2img_generate")
    page.wait_for_selector("#txt2img_gallery_container .livePreview img")
    page.wait_for_function("/\\d+%/.test(document.querySelector('.progressDiv').textContent)")
    page.wait_for_function("document.title.startsWith('[')")
    page.click("#txt2img_interrupt")
    wait_for_answer(page)
    assert site.app.state.sampling_step < 150
    assert site.app.jobs.tasks.current is None
    page.wait_for_function("!document.title.startsWith('[')")
    shown_picture(page)


def test_skip_goes_on_with_the_next_batch(page: Any, site: Site) -> None:
    page.fill("#txt2img_prompt textarea", "two batches")
    set_number(page, "txt2img_steps", 60)
    set_number(page, "txt2img_batch_count", 2)
    page.click("#txt2img_generate")
    page.wait_for_selector("#txt2img_gallery_container .livePreview img")
    page.click("#txt2img_skip")
    wait_for_answer(page)
    expect_text(page, "#html_log_txt2img", "Time taken")
    assert site.app.state.skipped is False or site.app.state.job_no >= 1


def test_keys_generate(page: Any, site: Site) -> None:
    page.fill("#txt2img_prompt textarea", "by key")
    set_number(page, "txt2img_steps", 2)
    page.press("#txt2img_prompt textarea", "Control+Enter")
    wait_for_answer(page)
    assert infotexts(page)[0].startswith("by key")


def test_selected_picture_rules_text_seed_and_what_is_sent(page: Any, site: Site) -> None:
    page.fill("#txt2img_prompt textarea", "a batch of three")
    set_number(page, "txt2img_steps", 2)
    set_number(page, "txt2img_batch_count", 3)
    set_number(page, "txt2img_seed", 50)
    site.app.options.return_grid = False
    generate(page)
    site.app.options.return_grid = True
    assert [re.findall(r"Seed: (\d+)", text) for text in infotexts(page)] == [["50"], ["51"], ["52"]]
    page.click("#txt2img_gallery .thumbnail-small >> nth=2")
    page.wait_for_function("document.querySelector('#html_info_txt2img').textContent.includes('Seed: 52')")
    page.click("#txt2img_reuse_seed")
    expect_number(page, "txt2img_seed", 52)
    page.click("#txt2img_random_seed")
    expect_number(page, "txt2img_seed", -1)
    page.click("#txt2img_send_to_img2img")
    page.wait_for_selector("#img2img_image img", state="visible")
    expect_number(page, "img2img_seed", 52)
    expect_value(page, "#img2img_prompt textarea", "a batch of three")
    expect_number(page, "img2img_steps", 2)


def test_same_seed_gives_the_same_picture(page: Any, site: Site) -> None:
    set_number(page, "txt2img_steps", 2)
    set_number(page, "txt2img_seed", 9)
    generate(page)
    first = newest_picture(site, "txt2img-images")
    generate(page)
    second = newest_picture(site, "txt2img-images")
    assert first != second
    with Image.open(first) as one, Image.open(second) as other:
        assert one.tobytes() == other.tobytes()


def write_picture(path: Path, size: tuple[int, int] = (96, 64)) -> str:
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    image.paste((200, 30, 30), (10, 10, 40, 40))
    image.save(path)
    return str(path)


def test_picture_becomes_another_in_img2img_of_its_size_or_by_a_factor(page: Any, site: Site, tmp_path: Path) -> None:
    show_img2img(page)
    put_picture(page, "#img2img_image", write_picture(tmp_path / "a.png"))
    page.click("#img2img_detect_image_size_btn")
    expect_number(page, "img2img_width", 96)
    page.fill("#img2img_prompt textarea", "from a picture")
    set_number(page, "img2img_steps", 4)
    generate(page, "img2img")
    shown_picture(page, "img2img")
    assert "Denoising strength: 0.75" in infotexts(page, "img2img")[0]
    with Image.open(newest_picture(site, "img2img-images")) as image:
        assert image.size == (96, 64)

    page.click("#img2img_tab_resize_by-button")
    page.wait_for_selector("#img2img_scale", state="visible")
    set_number(page, "img2img_scale", 1.5)
    page.wait_for_function("document.querySelector('#img2img_scale_resolution_preview').textContent.includes('to 144x96')")
    set_number(page, "img2img_steps", 2)
    generate(page, "img2img")
    with Image.open(newest_picture(site, "img2img-images")) as image:
        assert image.size == (144, 96)


def test_painted_mask_says_what_is_made_anew(new_page: Any, site: Site, tmp_path: Path) -> None:
    page = open_page(new_page, site)  # a canvas draws all the time: not in the shared window
    source = Path(write_picture(tmp_path / "a.png", (64, 64)))
    show_img2img(page)
    page.click("#img2img_inpaint_tab-button")
    page.wait_for_selector("#inpaint_controls", state="visible")
    page.wait_for_selector("#img2maskimg canvas")
    page.set_input_files("#img2maskimg input[type=file]", str(source))
    wait_for_picture_on_canvas(page, "#img2maskimg")
    paint(page, "#img2maskimg", by=(30, 10))
    set_number(page, "img2img_mask_blur", 0)
    set_number(page, "img2img_steps", 4)
    generate(page, "img2img")
    shown_picture(page, "img2img")
    with Image.open(newest_picture(site, "img2img-images")) as made, Image.open(source) as given:
        assert made.size == (64, 64)
        corners = [(0, 0), (63, 0), (0, 63), (63, 63)]
        assert [made.convert("RGB").getpixel(at) for at in corners] == [given.convert("RGB").getpixel(at) for at in corners]
        assert made.convert("RGB").getpixel((32, 32)) != given.convert("RGB").getpixel((32, 32))


def test_uploaded_mask_says_what_is_made_anew(page: Any, site: Site, tmp_path: Path) -> None:
    source = Path(write_picture(tmp_path / "a.png", (64, 64)))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    mask.save(tmp_path / "mask.png")
    show_img2img(page)
    page.click("#img2img_inpaint_upload_tab-button")
    page.wait_for_selector("#img_inpaint_mask", state="visible")
    page.set_input_files("#img_inpaint_base input[type=file]", str(source))
    page.set_input_files("#img_inpaint_mask input[type=file]", str(tmp_path / "mask.png"))
    page.wait_for_selector("#img_inpaint_base img")
    page.wait_for_selector("#img_inpaint_mask img")
    set_number(page, "img2img_mask_blur", 0)
    set_number(page, "img2img_steps", 4)
    generate(page, "img2img")
    with Image.open(newest_picture(site, "img2img-images")) as made, Image.open(source) as given:
        assert made.convert("RGB").getpixel((5, 5)) == given.convert("RGB").getpixel((5, 5))
        assert made.convert("RGB").getpixel((32, 32)) != given.convert("RGB").getpixel((32, 32))


def test_missing_picture_is_told_in_words(page: Any, site: Site) -> None:
    show_img2img(page)
    clear_picture(page, "#img2img_image")
    generate(page, "img2img")
    expect_text(page, "#html_log_img2img", "img2img needs a picture")
    page.wait_for_selector(".toast-body, [data-testid=toast-body]")
    assert "Traceback" not in page.content()


def test_png_info_reads_a_picture_and_sends_it_on(page: Any, site: Site) -> None:
    page.fill("#txt2img_prompt textarea", "to be read back")
    set_number(page, "txt2img_steps", 3)
    set_number(page, "txt2img_seed", 321)
    generate(page)
    text = page.inner_text("#html_info_txt2img")
    start_over(page)
    show_tab(page, "pnginfo")
    page.set_input_files("#pnginfo_image input[type=file]", str(newest_picture(site, "txt2img-images")))
    page.wait_for_function("document.querySelector('#pnginfo_generation_info textarea').value !== ''")
    expect_value(page, "#pnginfo_generation_info textarea", text)
    page.click("#txt2img_tab")
    expect_number(page, "txt2img_seed", 321)
    expect_value(page, "#txt2img_prompt textarea", "to be read back")
    expect_number(page, "txt2img_steps", 3)
    expected(page, "#tab_txt2img").to_be_visible()
    show_tab(page, "pnginfo")
    page.click("#img2img_tab")
    page.wait_for_selector("#img2img_image img", state="visible")
    expect_value(page, "#img2img_prompt textarea", "to be read back")


def test_pasted_parameters_fill_the_controls(page: Any, site: Site) -> None:
    parameters = "a fox\nNegative prompt: hen\nSteps: 11, Sampler: Heun, Schedule type: Karras, CFG scale: 3.5, Seed: 5, Size: 128x64, Clip skip: 2"
    page.fill("#txt2img_prompt textarea", parameters)
    page.click(".txt2img-paste")
    expect_number(page, "txt2img_steps", 11)
    expect_value(page, "#txt2img_prompt textarea", "a fox")
    expect_value(page, "#txt2img_neg_prompt textarea", "hen")
    expect_value(page, "#txt2img_sampling input", "Heun")
    expect_value(page, "#txt2img_scheduler input", "Karras")
    expect_number(page, "txt2img_width", 128)
    expect_number(page, "txt2img_height", 64)
    expect_number(page, "txt2img_cfg_scale", 3.5)
    expect_text(page, "#txt2img_override_settings", "Clip skip: 2")


def test_late_first_values_leave_what_was_pasted_meanwhile(new_page: Any, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is asked for first values when the page loads; while it looks through folders, people already type."""
    may_answer, refresh = threading.Event(), site.app.checkpoints.refresh
    monkeypatch.setattr(site.app.checkpoints, "refresh", lambda: (may_answer.wait(60), refresh()))
    try:
        page = open_page(new_page, site, until_first_values=False)
        page.fill("#txt2img_prompt textarea", "a fox\nSteps: 11, CFG scale: 3.5, Size: 128x64")
        page.click(".txt2img-paste")
        expect_number(page, "txt2img_width", 128)
        assert page.input_value("#first_values textarea") == ""
    finally:
        may_answer.set()
    expect_value(page, "#first_values textarea", re.compile("64"))
    wait_until_drawn(page)
    expect_number(page, "txt2img_width", 128)
    expect_number(page, "txt2img_height", 64)


def test_size_is_swapped_and_hires_size_follows(page: Any, site: Site) -> None:
    set_number(page, "txt2img_width", 128)
    page.click("#txt2img_hr > .label-wrap")
    page.wait_for_function("document.querySelector('#txtimg_hr_finalres').textContent.includes('from 128x64 to 256x128')")
    expected(page, "#txt2img_hr-visible-checkbox").to_be_checked()
    expected(page, "#txt2img_hr-checkbox input").to_be_checked()
    page.click("#txt2img_res_switch_btn")
    expect_number(page, "txt2img_height", 128)
    expect_number(page, "txt2img_width", 64)
    page.click("#txt2img_hr-visible-checkbox")
    page.wait_for_function("!document.querySelector('#txt2img_hr-checkbox input').checked")
    expected(page, "#txt2img_hr_scale").not_to_be_visible()


def test_hires_fix_makes_the_larger_picture(page: Any, site: Site) -> None:
    page.click("#txt2img_hr > .label-wrap")
    page.wait_for_function("document.querySelector('#txt2img_hr-checkbox input').checked")
    set_number(page, "txt2img_steps", 3)
    generate(page)
    assert "Hires upscale: 2" in infotexts(page)[0]
    with Image.open(newest_picture(site, "txt2img-images")) as image:
        assert image.size == (128, 128)


def test_upscale_button_replaces_the_picture_in_the_gallery(page: Any, site: Site) -> None:
    set_number(page, "txt2img_steps", 3)
    set_number(page, "txt2img_batch_count", 2)
    site.app.options.return_grid = False
    generate(page)
    page.click("#txt2img_gallery .thumbnail-small >> nth=1")
    page.click("#txt2img_upscale")
    wait_for_answer(page)
    site.app.options.return_grid = True
    texts = infotexts(page)
    assert len(texts) == 2
    assert "Hires upscale" not in texts[0] and "Hires upscale" in texts[1]
    expect_count(page, "#txt2img_gallery .thumbnail-small", 2)


def test_running_job_is_found_again_after_a_reload(new_page: Any, site: Site, observed: Observed) -> None:
    page = open_page(new_page, site)
    page.fill("#txt2img_prompt textarea", "reloaded meanwhile")
    set_number(page, "txt2img_steps", 100)
    page.click("#txt2img_generate")
    page.wait_for_selector("#txt2img_gallery_container .livePreview img")
    page.reload()
    wait_until_loaded(page)
    observed.errors.clear()  # the old page's connection was cut
    page.click("#txt2img_restore_progress")
    wait_for_answer(page)
    assert infotexts(page)[0].startswith("reloaded meanwhile")
    shown_picture(page)


def test_names_that_extensions_use_work(page: Any, site: Site) -> None:
    facts = page.evaluate(
        """() => {
            let loaded = false;
            onUiLoaded(() => { loaded = true; });
            const box = gradioApp().querySelector("#txt2img_prompt textarea");
            box.value = "set by a script";
            updateInput(box);
            const tab = [get_uiCurrentTab().textContent.trim(), get_uiCurrentTabContent().id];
            const hiddenTabIsThere = Boolean(gradioApp().querySelector("#img2img_prompt textarea"));
            const isTaskId = /^task\\(.+\\)$/.test(randomId());
            return [loaded, ...tab, typeof opts.samples_save, isTaskId, hiddenTabIsThere, gradioApp().getElementById("tabs") !== null];
        }"""
    )
    assert facts == [True, "Txt2img", "tab_txt2img", "boolean", True, True, True]
    page.wait_for_function("document.querySelector('#txt2img_token_counter').textContent.trim() === '4/75'")


def test_page_without_a_checkpoint_says_what_to_do_and_goes_on_when_one_is_there(new_page: Any, site: Site) -> None:
    remove_checkpoint(site)
    page = open_page(new_page, site)
    folder = str(site.app.config.ckpt_dirs[0])
    expect_text(page, "#no_checkpoint_notice", folder, ".safetensors")
    generate(page)
    expect_text(page, "#html_log_txt2img", folder)
    put_checkpoint(site.app.config.data_dir)
    page.wait_for_function("document.querySelector('#setting_sd_model_checkpoint input').value.startsWith('narrow')")
    page.wait_for_selector("#no_checkpoint_notice", state="hidden")
    expect_number(page, "txt2img_width", 64)
    set_number(page, "txt2img_steps", 2)
    generate(page)
    shown_picture(page)


def test_accordions_of_tabs_that_were_not_shown_yet_stay_as_they_were_made(new_page: Any, site: Site) -> None:
    page = open_page(new_page, site)
    show_tab(page, "extras")
    expected(page, "#extras_upscale-visible-checkbox").to_be_checked()
    page.wait_for_timeout(1000)  # nothing may happen meanwhile: an accordion that closes does so within a frame of being drawn
    for name, is_open in (("extras_upscale", True), ("extras_autosized_crop", False), ("txt2img_enable", False)):
        expected(page, f"#{name}-visible-checkbox").to_be_checked(checked=is_open)
    expected(page, "#img2img_enable-checkbox input").not_to_be_checked()


def test_a_picture_is_sent_to_extras_and_enlarged(page: Any, site: Site) -> None:
    page.fill("#txt2img_prompt textarea", "to be enlarged")
    set_number(page, "txt2img_steps", 2)
    generate(page)
    shown_picture(page)
    page.click("#txt2img_send_to_extras")
    page.wait_for_selector("#extras_image img")
    page.click("#extras_upscaler_1 input")
    page.get_by_role("option", name="Nearest").click()
    generate(page, "extras")
    shown_picture(page, "extras")
    expect_text(page, "#html_info_extras", "Postprocess upscale by: 4, Postprocess upscaler: Nearest")
    with Image.open(newest_picture(site, "extras-images")) as image:
        assert image.size == (256, 256)
        assert (read_info_from_image(image)[0] or "").startswith("to be enlarged")


@pytest.mark.nightly
def test_a_sketch_is_painted_on_a_copied_picture(new_page: Any, site: Site) -> None:
    page = open_page(new_page, site)  # a canvas draws all the time: not in the shared window
    page.fill("#txt2img_prompt textarea", "to be sketched on")
    set_number(page, "txt2img_steps", 2)
    generate(page)
    shown_picture(page)
    page.click("#txt2img_send_to_img2img")
    page.wait_for_selector("#img2img_image img")
    page.click("#img2img_copy_to_img2img button:has-text('sketch') >> nth=0")
    wait_for_picture_on_canvas(page, "#img2img_sketch")
    paint(page, "#img2img_sketch", by=(20, 20))
    set_number(page, "img2img_steps", 2)
    generate(page, "img2img")
    shown_picture(page, "img2img")
    expect_text(page, "#html_log_img2img", "Time taken")


def test_the_panel_shows_what_a_job_left_on_the_devices(page: Any, site: Site) -> None:
    """Closed at first, filled when opened, and up to date after a job."""
    site.app.models.unload()
    expected(page, "#txt2img_gpus_table table").not_to_be_visible()
    page.click("#txt2img_gpus > button")
    page.wait_for_selector("#txt2img_gpus_table table", state="visible")
    expected(page, "#txt2img_gpus_table").not_to_contain_text("KModel")
    set_number(page, "txt2img_steps", 3)  # done between two looks of the panel, or not
    generate(page)
    expect_text(page, "#txt2img_gpus_table", "KModel")
    show_tab(page, "img2img")
    page.click("#img2img_gpus > button")
    page.wait_for_selector("#img2img_gpus_table table", state="visible")
    expect_text(page, "#img2img_gpus_table", "KModel")
    page.click("#img2img_gpus > button")
    show_tab(page, "txt2img")
    page.click("#txt2img_gpus > button")  # an open panel asks the server all the time
    page.wait_for_selector("#txt2img_gpus_table table", state="hidden")


# the Settings tab has hundreds of controls: what comes after it is slow


def test_changed_setting_is_kept_and_found_by_search(page: Any, site: Site) -> None:
    show_tab(page, "settings")
    page.fill("#settings_search input, #settings_search textarea", "quality of jpeg")
    page.click("#settings_search_result button")
    page.wait_for_selector("#setting_jpeg_quality", state="visible")
    set_number(page, "setting_jpeg_quality", 55)
    page.click("#settings_submit")
    page.wait_for_function("document.querySelector('#settings_result').textContent.includes('Quality of jpeg')")
    assert site.app.options.jpeg_quality == 55
    page.wait_for_function("opts.jpeg_quality === 55")
    site.app.options.jpeg_quality = 80


def expect_all_within(page: Any, width: int) -> None:
    for tab in ("txt2img", "img2img", "pnginfo", "settings"):
        if page.locator(f"#tab_{tab}-button").is_visible():
            show_tab(page, tab)
            page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)


@pytest.mark.parametrize("width", [1440, 820, 420])
def test_nothing_runs_out_of_the_window(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    expect_all_within(page, width)


@pytest.mark.nightly
def test_nothing_runs_out_of_a_small_window_from_the_start(new_page: Any, site: Site) -> None:
    new_page.set_viewport_size({"width": 420, "height": 900})
    expect_all_within(open_page(new_page, site), 420)
