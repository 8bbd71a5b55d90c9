"""The page as a user meets it, in headless Chromium, with a small model behind it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modules.pictures.metadata import read_info_from_image
from tests.browser.conftest import Observed, Site, put_checkpoint

GALLERY_IMAGE = "#{tab}_gallery .preview img[data-testid=detailed-image]"


def open_page(page: Any, site: Site, query: str = "") -> None:
    """Load the page and wait until its scripts have set it up."""
    page.goto(f"{site.address}/{query}")
    wait_until_loaded(page)


def wait_until_loaded(page: Any) -> None:
    """Also begins to count the answers that Generate gets."""
    page.wait_for_function("typeof uiIsLoaded !== 'undefined' && uiIsLoaded && optionsAreAvailable")
    page.evaluate("() => { window.numAnswers = 0; const before = taskAnswered; taskAnswered = (tab) => { before(tab); window.numAnswers += 1; }; }")


def show_tab(page: Any, name: str) -> None:
    page.click(f"#tab_{name}-button")
    page.wait_for_selector(f"#tab_{name}", state="visible")


def set_number(page: Any, elem_id: str, value: int) -> None:
    """Type into a number field or a slider's number."""
    box = page.locator(f"#{elem_id} input[type=number]")
    for _ in range(20):  # the page's own first values may still arrive
        box.fill(str(value))
        box.press("Tab")
        page.wait_for_timeout(500)
        if number(page, elem_id) == value:
            return
    raise AssertionError(f"{elem_id} does not keep {value}")


def number(page: Any, elem_id: str) -> float:
    return float(page.input_value(f"#{elem_id} input[type=number]"))


def wait_for_number(page: Any, elem_id: str, value: int) -> None:
    page.wait_for_function("([id, value]) => Number(document.querySelector(`#${id} input[type=number]`).value) === value", arg=[elem_id, value])


def generate(page: Any, tab: str = "txt2img") -> None:
    """Press Generate and wait for the answer."""
    page.click(f"#{tab}_generate")
    wait_for_answer(page, tab)


def wait_for_answer(page: Any, tab: str = "txt2img") -> None:
    page.wait_for_function("window.numAnswers > 0")
    page.evaluate("window.numAnswers = 0")
    page.wait_for_selector(f"#{tab}_generate", state="visible")


def infotexts(page: Any, tab: str = "txt2img") -> list[str]:
    return list(json.loads(page.input_value(f"#generation_info_{tab} textarea"))["infotexts"])


def shown_picture(page: Any, tab: str = "txt2img") -> str:
    """The address of the large picture, once it is loaded."""
    selector = GALLERY_IMAGE.format(tab=tab)
    page.wait_for_function("selector => (document.querySelector(selector) || {}).naturalWidth > 0", arg=selector)
    return str(page.get_attribute(selector, "src"))


def newest_picture(site: Site, kind: str) -> Path:
    return max(site.app.config.outputs_dir.glob(f"{kind}/**/*.png"), key=lambda path: path.stat().st_mtime_ns)


def test_prompt_becomes_a_picture(page: Any, site: Site) -> None:
    open_page(page, site)
    assert (number(page, "txt2img_width"), number(page, "txt2img_height")) == (64, 64)
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
    text = page.inner_text("#html_info_txt2img")
    assert text.startswith("a photo of a cat\nNegative prompt: a dog\nSteps: 6, Sampler: Euler a")
    assert "Seed: 1234" in text and "Size: 64x64" in text and "Model: narrow" in text
    assert "Time taken" in page.inner_text("#html_log_txt2img")
    assert infotexts(page) == [text]
    assert page.locator(".progressDiv, .livePreview").count() == 0
    saved = newest_picture(site, "txt2img-images")
    assert saved.name in source
    with Image.open(saved) as image:
        assert image.size == (64, 64)
        assert read_info_from_image(image)[0] == text


def test_preview_and_progress_show_while_it_works_and_interrupt_ends_it(page: Any, site: Site) -> None:
    open_page(page, site)
    page.fill("#txt2img_prompt textarea", "many steps")
    set_number(page, "txt2img_steps", 150)
    page.click("#txt2img_generate")
    page.wait_for_selector("#txt2img_gallery_container .livePreview img")
    page.wait_for_function("/\\d+%/.test(document.querySelector('.progressDiv').textContent)")
    assert page.title().startswith("[")
    page.click("#txt2img_interrupt")
    wait_for_answer(page)
    assert site.app.state.sampling_step < 150
    assert site.app.jobs.tasks.current is None
    assert not page.title().startswith("[")
    shown_picture(page)


def test_skip_goes_on_with_the_next_batch(page: Any, site: Site) -> None:
    open_page(page, site)
    page.fill("#txt2img_prompt textarea", "two batches")
    set_number(page, "txt2img_steps", 60)
    set_number(page, "txt2img_batch_count", 2)
    page.click("#txt2img_generate")
    page.wait_for_selector("#txt2img_gallery_container .livePreview img")
    page.click("#txt2img_skip")
    wait_for_answer(page)
    assert "Time taken" in page.inner_text("#html_log_txt2img")
    assert site.app.state.skipped is False or site.app.state.job_no >= 1


def test_keys_generate(page: Any, site: Site) -> None:
    open_page(page, site)
    page.fill("#txt2img_prompt textarea", "by key")
    set_number(page, "txt2img_steps", 2)
    page.press("#txt2img_prompt textarea", "Control+Enter")
    wait_for_answer(page)
    assert infotexts(page)[0].startswith("by key")


def test_selected_picture_rules_text_seed_and_what_is_sent(page: Any, site: Site) -> None:
    open_page(page, site)
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
    wait_for_number(page, "txt2img_seed", 52)
    page.click("#txt2img_random_seed")
    wait_for_number(page, "txt2img_seed", -1)
    page.click("#txt2img_send_to_img2img")
    page.wait_for_selector("#img2img_image img", state="visible")
    wait_for_number(page, "img2img_seed", 52)
    assert page.input_value("#img2img_prompt textarea") == "a batch of three"
    assert number(page, "img2img_steps") == 2


def test_same_seed_gives_the_same_picture(page: Any, site: Site) -> None:
    open_page(page, site)
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


def test_picture_becomes_another_in_img2img(page: Any, site: Site, tmp_path: Path) -> None:
    open_page(page, site)
    show_tab(page, "img2img")
    page.set_input_files("#img2img_image input[type=file]", write_picture(tmp_path / "a.png"))
    page.wait_for_selector("#img2img_image img")
    page.click("#img2img_detect_image_size_btn")
    wait_for_number(page, "img2img_width", 96)
    page.fill("#img2img_prompt textarea", "from a picture")
    set_number(page, "img2img_steps", 4)
    generate(page, "img2img")
    shown_picture(page, "img2img")
    assert "Denoising strength: 0.75" in infotexts(page, "img2img")[0]
    with Image.open(newest_picture(site, "img2img-images")) as image:
        assert image.size == (96, 64)


def test_resize_by_tells_the_size_and_uses_it(page: Any, site: Site, tmp_path: Path) -> None:
    open_page(page, site)
    show_tab(page, "img2img")
    page.set_input_files("#img2img_image input[type=file]", write_picture(tmp_path / "a.png", (64, 64)))
    page.wait_for_selector("#img2img_image img")
    page.click("#img2img_tab_resize_by-button")
    page.wait_for_selector("#img2img_scale", state="visible")
    set_number(page, "img2img_scale", 2)
    page.wait_for_function("document.querySelector('#img2img_scale_resolution_preview').textContent.includes('to 128x128')")
    set_number(page, "img2img_steps", 2)
    generate(page, "img2img")
    with Image.open(newest_picture(site, "img2img-images")) as image:
        assert image.size == (128, 128)


def test_painted_mask_says_what_is_made_anew(page: Any, site: Site, tmp_path: Path) -> None:
    source = Path(write_picture(tmp_path / "a.png", (64, 64)))
    open_page(page, site)
    show_tab(page, "img2img")
    page.click("#img2img_inpaint_tab-button")
    page.wait_for_selector("#inpaint_controls", state="visible")
    page.wait_for_selector("#img2maskimg canvas")
    page.set_input_files("#img2maskimg input[type=file]", str(source))
    page.wait_for_timeout(1500)  # the editor fits the picture into its view without saying when it is done
    box = page.locator("#img2maskimg canvas").first.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 30, middle[1] + 10, steps=5)
    page.mouse.up()
    page.wait_for_timeout(500)
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
    open_page(page, site)
    show_tab(page, "img2img")
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
    open_page(page, site)
    show_tab(page, "img2img")
    generate(page, "img2img")
    assert "img2img needs a picture" in page.inner_text("#html_log_img2img")
    assert "Traceback" not in page.content()
    page.wait_for_selector(".toast-body, [data-testid=toast-body]")


def test_png_info_reads_a_picture_and_sends_it_on(page: Any, site: Site) -> None:
    open_page(page, site)
    page.fill("#txt2img_prompt textarea", "to be read back")
    set_number(page, "txt2img_steps", 3)
    set_number(page, "txt2img_seed", 321)
    generate(page)
    text = page.inner_text("#html_info_txt2img")
    page.reload()
    wait_until_loaded(page)
    show_tab(page, "pnginfo")
    page.set_input_files("#pnginfo_image input[type=file]", str(newest_picture(site, "txt2img-images")))
    page.wait_for_function("document.querySelector('#pnginfo_generation_info textarea').value !== ''")
    assert page.input_value("#pnginfo_generation_info textarea") == text
    page.click("#txt2img_tab")
    wait_for_number(page, "txt2img_seed", 321)
    assert page.input_value("#txt2img_prompt textarea") == "to be read back"
    assert number(page, "txt2img_steps") == 3
    assert page.locator("#tab_txt2img").is_visible()
    show_tab(page, "pnginfo")
    page.click("#img2img_tab")
    page.wait_for_selector("#img2img_image img", state="visible")
    assert page.input_value("#img2img_prompt textarea") == "to be read back"


def test_pasted_parameters_fill_the_controls(page: Any, site: Site) -> None:
    open_page(page, site)
    parameters = "a fox\nNegative prompt: hen\nSteps: 11, Sampler: Heun, Schedule type: Karras, CFG scale: 3.5, Seed: 5, Size: 128x64, Clip skip: 2"
    page.fill("#txt2img_prompt textarea", parameters)
    page.click(".txt2img-paste")
    wait_for_number(page, "txt2img_steps", 11)
    assert page.input_value("#txt2img_prompt textarea") == "a fox"
    assert page.input_value("#txt2img_neg_prompt textarea") == "hen"
    assert page.input_value("#txt2img_sampling input") == "Heun"
    assert page.input_value("#txt2img_scheduler input") == "Karras"
    assert (number(page, "txt2img_width"), number(page, "txt2img_height"), number(page, "txt2img_cfg_scale")) == (128, 64, 3.5)
    assert "Clip skip: 2" in page.inner_text("#txt2img_override_settings")


def test_size_is_swapped_and_hires_size_follows(page: Any, site: Site) -> None:
    open_page(page, site)
    set_number(page, "txt2img_width", 128)
    page.click("#txt2img_hr > .label-wrap")
    page.wait_for_function("document.querySelector('#txtimg_hr_finalres').textContent.includes('from 128x64 to 256x128')")
    assert page.is_checked("#txt2img_hr-visible-checkbox")
    assert page.is_checked("#txt2img_hr-checkbox input")
    page.click("#txt2img_res_switch_btn")
    wait_for_number(page, "txt2img_height", 128)
    assert number(page, "txt2img_width") == 64
    page.click("#txt2img_hr-visible-checkbox")
    page.wait_for_function("!document.querySelector('#txt2img_hr-checkbox input').checked")
    assert not page.locator("#txt2img_hr_scale").is_visible()


def test_hires_fix_makes_the_larger_picture(page: Any, site: Site) -> None:
    open_page(page, site)
    page.click("#txt2img_hr > .label-wrap")
    page.wait_for_function("document.querySelector('#txt2img_hr-checkbox input').checked")
    set_number(page, "txt2img_steps", 3)
    generate(page)
    assert "Hires upscale: 2" in infotexts(page)[0]
    with Image.open(newest_picture(site, "txt2img-images")) as image:
        assert image.size == (128, 128)


def test_upscale_button_replaces_the_picture_in_the_gallery(page: Any, site: Site) -> None:
    open_page(page, site)
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
    assert page.locator("#txt2img_gallery .thumbnail-small").count() == 2


def test_changed_setting_is_kept_and_found_by_search(page: Any, site: Site) -> None:
    open_page(page, site)
    show_tab(page, "settings")
    page.fill("#settings_search input, #settings_search textarea", "quality of jpeg")
    page.click("#settings_search_result button")
    page.wait_for_selector("#setting_jpeg_quality", state="visible")
    set_number(page, "setting_jpeg_quality", 55)
    page.click("#settings_submit")
    page.wait_for_function("document.querySelector('#settings_result').textContent.includes('jpeg_quality')")
    assert site.app.options.jpeg_quality == 55
    page.wait_for_function("opts.jpeg_quality === 55")
    site.app.options.jpeg_quality = 80


def test_running_job_is_found_again_after_a_reload(page: Any, site: Site, observed: Observed) -> None:
    open_page(page, site)
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
    open_page(page, site)
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


@pytest.mark.parametrize("width", [1440, 820, 420])
def test_nothing_runs_out_of_the_window(page: Any, site: Site, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    open_page(page, site)
    for tab in ("txt2img", "img2img", "pnginfo", "settings"):
        if page.locator(f"#tab_{tab}-button").is_visible():
            show_tab(page, tab)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, tab


def test_dark_theme(page: Any, site: Site) -> None:
    open_page(page, site, "?__theme=dark")
    assert page.evaluate("document.body.classList.contains('dark')")


def test_page_without_a_checkpoint_says_what_to_do_and_goes_on_when_one_is_there(page: Any, empty_site: Site) -> None:
    open_page(page, empty_site)
    folder = str(empty_site.app.config.ckpt_dirs[0])
    notice = page.inner_text("#no_checkpoint_notice")
    assert folder in notice and ".safetensors" in notice
    generate(page)
    assert folder in page.inner_text("#html_log_txt2img")
    put_checkpoint(empty_site.app.config.data_dir)
    page.wait_for_function("document.querySelector('#setting_sd_model_checkpoint input').value.startsWith('narrow')")
    page.wait_for_selector("#no_checkpoint_notice", state="hidden")
    wait_for_number(page, "txt2img_width", 64)
    set_number(page, "txt2img_steps", 2)
    generate(page)
    shown_picture(page)


def test_accordions_of_tabs_that_were_not_shown_yet_stay_as_they_were_made(page: Any, site: Site) -> None:
    open_page(page, site)
    show_tab(page, "extras")
    page.wait_for_timeout(2000)
    states = {name: page.is_checked(f"#{name}-visible-checkbox") for name in ("extras_upscale", "extras_autosized_crop", "txt2img_enable")}
    assert states == {"extras_upscale": True, "extras_autosized_crop": False, "txt2img_enable": False}
    assert not page.is_checked("#img2img_enable-checkbox input")


def test_a_picture_is_sent_to_extras_and_enlarged(page: Any, site: Site) -> None:
    open_page(page, site)
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
    assert "Postprocess upscale by: 4, Postprocess upscaler: Nearest" in page.inner_text("#html_info_extras")
    with Image.open(newest_picture(site, "extras-images")) as image:
        assert image.size == (256, 256)
        assert (read_info_from_image(image)[0] or "").startswith("to be enlarged")


def test_a_sketch_is_painted_on_a_copied_picture(page: Any, site: Site) -> None:
    open_page(page, site)
    page.fill("#txt2img_prompt textarea", "to be sketched on")
    set_number(page, "txt2img_steps", 2)
    generate(page)
    shown_picture(page)
    page.click("#txt2img_send_to_img2img")
    page.wait_for_selector("#img2img_image img")
    page.click("#img2img_copy_to_img2img button:has-text('sketch') >> nth=0")
    page.wait_for_selector("#img2img_sketch canvas")
    page.wait_for_timeout(2000)
    box = page.locator("#img2img_sketch canvas").first.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 20, middle[1] + 20, steps=10)
    page.mouse.up()
    page.wait_for_timeout(1000)
    set_number(page, "img2img_steps", 2)
    generate(page, "img2img")
    shown_picture(page, "img2img")
    assert "Time taken" in page.inner_text("#html_log_img2img")
