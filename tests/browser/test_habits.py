"""What people's hands know of the page: keys in prompts, pictures dropped and pasted, the full page viewer, the bar between the columns."""

from __future__ import annotations

import base64
import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from tests.browser.actions import (
    clear_picture,
    expect_count,
    expect_number,
    expect_text,
    expect_value,
    expected,
    generate,
    newest_picture,
    set_number,
    show_img2img,
    show_tab,
    wait_for_answer,
)
from tests.browser.conftest import Site

PROMPT = "#txt2img_prompt textarea"
INFOTEXT = "a dropped bird\nNegative prompt: clouds\nSteps: 7, Sampler: Euler, Schedule type: Automatic, CFG scale: 3, Seed: 77, Size: 128x64"


def png_base64(infotext: str = "", color: str = "teal", size: tuple[int, int] = (96, 64)) -> str:
    data, content = PngImagePlugin.PngInfo(), io.BytesIO()
    if infotext:
        data.add_text("parameters", infotext)
    Image.new("RGB", size, color).save(content, format="PNG", pnginfo=data)
    return base64.b64encode(content.getvalue()).decode()


def put_cursor(page: Any, start: int, end: int | None = None) -> None:
    page.evaluate(f"([start, end]) => document.querySelector('{PROMPT}').setSelectionRange(start, end)", [start, start if end is None else end])


@pytest.mark.parametrize(
    ("text", "cursor", "keys", "result"),
    [
        ("a red cat", (3, None), ["Control+ArrowUp"], "a (red:1.1) cat"),
        ("a red cat", (3, None), ["Control+ArrowUp", "Control+ArrowUp", "Control+ArrowDown"], "a (red:1.1) cat"),
        ("a red cat", (3, None), ["Control+ArrowUp", "Control+ArrowDown"], "a red cat"),
        ("a red cat", (2, 9), ["Control+ArrowDown"], "a (red cat:0.9)"),
        ("a (red:1.25) cat", (4, None), ["Control+ArrowUp"], "a (red:1.35) cat"),
        ("a (red cat), dog", (4, None), ["Control+ArrowUp"], "a (red cat:1.2), dog"),
        (r"a \(red\) cat", (6, None), ["Control+ArrowUp"], r"a \((red:1.1)\) cat"),
        ("x <lora:ink:0.8> y", (8, None), ["Control+ArrowUp"], "x <lora:ink:0.85> y"),
        ("x <lora:ink:0.8:0.5> y", (8, None), ["Control+ArrowDown"], "x <lora:ink:0.75:0.5> y"),
        ("x <lora:ink> y", (8, None), ["Control+ArrowUp"], "x <lora:ink:1.05> y"),
        ("  ", (1, None), ["Control+ArrowUp"], "  "),
        ("one, two, three", (6, None), ["Alt+ArrowRight"], "one, three, two"),
        ("one, two, three", (6, None), ["Alt+ArrowLeft", "Alt+ArrowLeft"], "two, one, three"),
        ("one, (two, b:1.2), three", (20, None), ["Alt+ArrowLeft"], "one, three, (two, b:1.2)"),
        ("one, two, three", (0, 8), ["Alt+ArrowRight"], "three, one, two"),
    ],
)
def test_keys_change_weights_and_order(page: Any, site: Site, text: str, cursor: tuple[int, int | None], keys: list[str], result: str) -> None:
    page.fill(PROMPT, text)
    put_cursor(page, *cursor)
    for key in keys:
        page.keyboard.press(key)
    assert page.input_value(PROMPT) == result


def test_what_the_keys_did_is_undone_and_reaches_the_server(page: Any, site: Site) -> None:
    page.fill(PROMPT, "a red cat")
    put_cursor(page, 3)
    page.keyboard.press("Control+ArrowUp")
    generate(page)
    expect_text(page, "#html_info_txt2img", "a (red:1.1) cat")
    page.focus(PROMPT)
    page.keyboard.press("Control+z")
    assert page.input_value(PROMPT) == "a red cat"


def drop(page: Any, selector: str, content: str, *, name: str = "picture.png", kind: str = "image/png") -> None:
    transfer = page.evaluate_handle(
        """([content, name, kind]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(atob(content), sign => sign.charCodeAt(0))], name, {type: kind}));
            return transfer;
        }""",
        [content, name, kind],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event(selector, event, {"dataTransfer": transfer})


def test_a_picture_dropped_on_a_prompt_fills_the_controls(page: Any, site: Site) -> None:
    drop(page, PROMPT, png_base64(INFOTEXT))
    expect_value(page, PROMPT, "a dropped bird")
    expect_value(page, "#txt2img_neg_prompt textarea", "clouds")
    for name, value in {"steps": 7, "cfg_scale": 3, "seed": 77, "width": 128, "height": 64}.items():
        expect_number(page, f"txt2img_{name}", value)
    drop(page, PROMPT, base64.b64encode(b"no picture at all").decode())
    expected(page, ".toast-body").to_contain_text("contains no parameters")
    expect_value(page, PROMPT, "a dropped bird")
    page.click(".toast-close")
    drop(page, PROMPT, png_base64(INFOTEXT.replace("bird", "fish")))  # the field takes another one
    expect_value(page, PROMPT, "a dropped fish")


def test_a_picture_is_pasted_and_another_dropped_in_its_place(page: Any, site: Site) -> None:
    show_img2img(page)
    clear_picture(page, "#img2img_image")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async content => navigator.clipboard.write([new ClipboardItem({
            "image/png": new Blob([Uint8Array.from(atob(content), sign => sign.charCodeAt(0))], {type: "image/png"})})])""",
        png_base64(size=(96, 64)),
    )
    page.click("#img2img_generation_tab-button")
    page.keyboard.press("Control+v")
    page.wait_for_selector("#img2img_image img")
    page.wait_for_function("(currentImg2imgSourceResolution() || []).slice(0, 2).join() === '96,64'")
    drop(page, "#img2img_image img", png_base64(size=(64, 128)))
    page.wait_for_function("(currentImg2imgSourceResolution() || []).slice(0, 2).join() === '64,128'")
    page.fill("#img2img_width input[type=number]", "512")
    expected(page, "#imageARPreview").to_be_visible()
    shape = page.evaluate("() => { const box = document.getElementById('imageARPreview').getBoundingClientRect(); return box.width / box.height; }")
    assert shape == pytest.approx(512 / 64, rel=0.05)
    set_number(page, "img2img_width", 64)
    clear_picture(page, "#img2img_image")


def test_the_viewer_zooms_pans_turns_pages_and_saves(page: Any, site: Site) -> None:
    set_number(page, "txt2img_batch_count", 2)
    generate(page)
    page.wait_for_function("all_gallery_buttons().length === 3")  # with the grid
    page.click("#txt2img_gallery .preview .media-button")
    expected(page, "#lightboxModal").to_be_visible()
    first = page.get_attribute("#modalImage", "src")
    box = page.locator("#modalImage").bounding_box()
    assert box["width"] >= 1400 or box["height"] >= 880  # it fills the window
    page.mouse.move(400, 300)
    page.mouse.wheel(0, -300)
    page.wait_for_function("lightboxView.scale > 1.1")
    before = page.evaluate("lightboxView")
    page.mouse.down()
    page.mouse.move(460, 340, steps=4)
    page.mouse.up()
    after = page.evaluate("lightboxView")
    assert (after["x"] - before["x"], after["y"] - before["y"]) == (60, 40)
    expected(page, "#lightboxModal").to_be_visible()  # a drag is no click beside the picture
    page.keyboard.press("0")
    assert page.evaluate("lightboxView.scale") == 1
    page.keyboard.press("ArrowRight")
    page.wait_for_function("first => document.getElementById('modalImage').src !== first", arg=first)
    page.click("#modalPrev")
    expected(page, "#modalImage").to_have_attribute("src", re.compile(re.escape(str(first).rpartition("/")[2])))
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.getElementById('lightboxModal')).backgroundImage").startswith("url(")
    page.keyboard.press("t")
    page.keyboard.press("s")
    expect_text(page, "#html_log_txt2img", "Saved")
    page.keyboard.press("Escape")
    expected(page, "#lightboxModal").to_be_hidden()
    audio = "document.querySelector('#audio_notification audio')"
    assert page.evaluate(f"[{audio}.volume, {audio}.duration > 0.4, lastHeadImg !== null]") == [1, True, True]


def test_the_bar_between_the_columns_is_dragged_and_put_back(page: Any, site: Site) -> None:
    width = "() => document.querySelector('#txt2img_settings').getBoundingClientRect().width"
    before = page.evaluate(width)
    box = page.locator("#txt2img_generation_tab .resize-handle").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + 100
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 150, y, steps=5)
    page.mouse.up()
    assert page.evaluate(width) == pytest.approx(before - 150, abs=8)
    page.keyboard.press("ArrowRight")
    assert page.evaluate(width) == pytest.approx(before - 126, abs=8)
    page.mouse.dblclick(*(lambda now: (now["x"] + 3, now["y"] + 100))(page.locator("#txt2img_generation_tab .resize-handle").bounding_box()))
    assert page.evaluate(width) == pytest.approx(before, abs=2)


def test_prompt_to_seed_is_on_screen(page: Any, site: Site) -> None:
    assert page.evaluate("document.querySelector('#txt2img_prompt').getBoundingClientRect().top") >= 0
    assert page.evaluate("document.querySelector('#txt2img_seed').getBoundingClientRect().bottom") <= 900


def test_controls_say_what_they_do(page: Any, site: Site) -> None:
    for label in ("Sampling steps", "CFG Scale", "Seed", "Batch count"):
        span = page.locator(f"#txt2img_settings span[data-testid=block-info]:text-is('{label}'), #txt2img_settings label > span:text-is('{label}')")
        expected_title = page.evaluate("label => titles[label]", label)
        page.wait_for_function("([element, title]) => element.title === title", arg=[span.first.element_handle(), expected_title])
    assert page.get_attribute("#txt2img_enqueue", "title")


def test_two_numbers_pasted_into_width_fill_both(page: Any, site: Site) -> None:
    page.evaluate(
        """() => {
            const transfer = new DataTransfer();
            transfer.setData("text", "128x192");
            document.querySelector("#txt2img_width input[type=number]").dispatchEvent(
                new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true}));
        }"""
    )
    expect_number(page, "txt2img_width", 128)
    expect_number(page, "txt2img_height", 192)


# ---- queue ----


@pytest.fixture
def gate(site: Site) -> Iterator[threading.Event]:
    """A job runs until it is set, or the test is over."""
    started, gate = threading.Event(), threading.Event()
    site.app.jobs.submit(None, "hold", lambda: (started.set(), gate.wait(60)))
    started.wait(10)
    yield gate
    gate.set()


def test_jobs_are_queued_moved_canceled_and_repeated(page: Any, site: Site, gate: threading.Event) -> None:
    set_number(page, "txt2img_steps", 1)
    for prompt in ("first in line", "second in line", "third in line"):
        page.fill(PROMPT, prompt)
        page.focus(PROMPT)
        page.keyboard.press("Control+Shift+Enter")
        page.wait_for_function(
            "prompt => fetch('./webui_queue/jobs').then(answer => answer.json()).then(({jobs}) => jobs.some(job => job.label === prompt))", arg=prompt
        )
    expect_text(page, "#html_log_txt2img", "is in the queue")
    show_tab(page, "queue")
    expect_count(page, "#queue_jobs .job-waiting", 3)
    assert page.locator("#queue_jobs .job-waiting td:nth-child(3)").all_inner_texts() == ["first in line", "second in line", "third in line"]
    page.click("#queue_jobs .job-waiting:has-text('third') button[title$='forward']")
    expected(page, "#queue_jobs .job-waiting >> nth=1").to_contain_text("third in line")
    page.click("#queue_jobs .job-waiting:has-text('third') button[title$='forward']")
    expected(page, "#queue_jobs .job-waiting >> nth=0").to_contain_text("third in line")
    page.click("#queue_jobs .job-waiting:has-text('second') button[title^='Cancel']")
    expect_count(page, "#queue_jobs .job-canceled", 1)
    page.click("#queue_jobs .job-running button[title^='Interrupt']")
    page.wait_for_timeout(200)
    gate.set()
    expect_count(page, "#queue_jobs .job-interrupted", 1)
    expect_count(page, "#queue_jobs .job-done:has-text('in line')", 2)
    newest = newest_picture(site, "txt2img-images")
    with Image.open(newest) as picture:
        assert picture.info["parameters"].startswith("first in line")  # the third had been moved before it
    page.click("#queue_jobs tr:has-text('third in line') button[title^='Repeat']")
    expect_count(page, "#queue_jobs .job-done:has-text('in line')", 3)
    show_tab(page, "txt2img")
    wait_for_answer(page)
    expect_text(page, "#html_info_txt2img", "third in line")


# ---- history ----


def put_pictures(site: Site) -> list[Path]:
    folder = site.app.config.outputs_dir / "txt2img-images" / "2024-01-01"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (color, words) in enumerate({"crimson": "zebra in the rain", "navy": "zebra at night <script>", "olive": "a teapot"}.items()):
        file = folder / f"0000{number}-history.png"
        file.write_bytes(base64.b64decode(png_base64(f"{words}\nSteps: 9, Sampler: Euler, CFG scale: 4, Seed: {number}, Size: 64x64", color)))
        files.append(file)
    return files


def test_the_history_searches_stars_compares_deletes_and_sends(page: Any, site: Site) -> None:
    files = put_pictures(site)
    show_tab(page, "history")
    page.fill("#history_search", "zebr")
    expect_count(page, "#history_grid .history-tile", 2)
    page.wait_for_function("Array.from(document.querySelectorAll('.history-tile img')).every(image => image.naturalWidth > 0)")
    page.fill("#history_search", "zebra -night")
    expect_count(page, "#history_grid .history-tile", 1)
    page.click(".history-tile")
    expect_text(page, "#history_infotext", "zebra in the rain")
    page.keyboard.press("s")
    expect_count(page, ".history-tile.with-star", 1)
    page.fill("#history_search", "")
    page.check("#history_stars")
    expect_count(page, "#history_grid .history-tile", 1)
    page.uncheck("#history_stars")
    page.fill("#history_search", "zebra")
    expect_count(page, "#history_grid .history-tile", 2)
    page.click(".history-tile >> nth=0")
    page.click(".history-tile >> nth=1", modifiers=["Control"])
    page.click("#history_compare")
    expect_count(page, ".history-compare img", 2)
    box = page.locator(".history-compare").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 20)
    page.wait_for_function("parseFloat(document.querySelector('.history-compare').style.getPropertyValue('--share')) > 60")
    page.keyboard.press("Escape")
    expect_count(page, ".history-compare", 0)
    page.fill("#history_search", "night")
    expected(page, "#history_grid .history-tile >> nth=0").to_have_attribute("aria-label", re.compile("00001-history"))
    expect_count(page, "#history_grid .history-tile", 1)
    page.click(".history-tile")
    page.click("#history_delete")
    expect_count(page, "#history_grid .history-tile", 0)
    assert [file.exists() for file in files] == [True, False, True]
    page.click("#history_trash")
    expect_count(page, "#history_grid .history-tile", 1)
    page.click(".history-tile")
    page.click("#history_delete")  # now it puts back
    expect_count(page, "#history_grid .history-tile", 0)
    assert files[1].exists()
    page.click("#history_trash")
    page.fill("#history_search", "teapot")
    expected(page, "#history_grid .history-tile >> nth=0").to_have_attribute("aria-label", re.compile("00002-history"))
    page.click(".history-tile")
    page.dblclick(".history-tile")
    expected(page, "#lightboxModal").to_be_visible()
    page.keyboard.press("Escape")
    page.click("#history_send_to_img2img")
    expect_value(page, "#img2img_prompt textarea", "a teapot")
    page.wait_for_selector("#img2img_image img")
    clear_picture(page, "#img2img_image")


# ---- canvases to paint on ----

CANVAS = "#img2maskimg"
PAINTED = "(() => { const value = document.querySelector('#img2maskimg_value textarea').value; return value ? JSON.parse(value).layer : null; })()"


def mask_of(page: Any) -> Image.Image:
    """What is painted, as the server gets it: the alpha channel."""
    text = page.evaluate(PAINTED)
    return Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))).getchannel("A")


def drag(page: Any, start: tuple[float, float], end: tuple[float, float], *, button: str = "left") -> None:
    """By shares of the canvas area."""
    box = page.locator(f"{CANVAS} .paint-area").bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down(button=button)
    page.mouse.move(*points[1], steps=4)
    page.mouse.up(button=button)


def test_a_mask_is_painted_erased_undone_and_kept_through_zoom(page: Any, site: Site, tmp_path: Path) -> None:
    source = tmp_path / "source.png"
    source.write_bytes(base64.b64decode(png_base64(color="silver", size=(256, 128))))
    show_tab(page, "img2img")
    page.click("#img2img_inpaint_tab-button")
    assert page.evaluate("Array.from(document.querySelectorAll('canvas')).every(canvas => !canvas.getContext('webgl'))")  # works without WebGL
    page.set_input_files(f"{CANVAS} input[type=file]", str(source))
    page.wait_for_selector(f"{CANVAS} .paint-frame.has-picture")
    page.wait_for_function("paintCanvases.img2maskimg.layer.width === 256")
    drag(page, (0.4, 0.5), (0.6, 0.5))
    mask = mask_of(page)
    assert mask.size == (256, 128)
    left, top, right, bottom = mask.getbbox()
    assert abs(left - (0.4 * 256 - 12)) < 14 and abs(right - (0.6 * 256 + 12)) < 14 and bottom - top == pytest.approx(24, abs=3)
    seen = page.evaluate(
        "(() => { const canvas = document.querySelector('#img2maskimg .paint-seen'); const context = canvas.getContext('2d');"
        " const colors = new Set(); const data = context.getImageData(110, 60, 30, 8).data;"
        " for (let i = 0; i < data.length; i += 4) colors.add(data.slice(i, i + 3).join()); return [colors.size, canvas.style.opacity]; })()"
    )
    assert seen[0] > 1 and float(seen[1]) == 0.75  # patterned and half transparent
    page.keyboard.press("e")
    expected(page, f"{CANVAS} .paint-eraser").to_have_attribute("aria-pressed", "true")
    drag(page, (0.5, 0.2), (0.5, 0.8))
    erased = mask_of(page)
    assert erased.getpixel((128, 64)) == 0 and erased.getbbox() == (left, top, right, bottom)
    page.keyboard.press("Control+z")
    assert mask_of(page).getpixel((128, 64)) == 255
    page.keyboard.press("Control+z")
    assert page.evaluate(PAINTED) is None
    page.keyboard.press("Control+y")
    assert mask_of(page).getbbox() == (left, top, right, bottom)
    page.keyboard.press("b")
    before = page.evaluate("paintCanvases.img2maskimg.view")
    page.mouse.wheel(0, -300)
    page.wait_for_function("scale => paintCanvases.img2maskimg.view.scale > scale", arg=before["scale"])
    view = page.evaluate("paintCanvases.img2maskimg.view")
    drag(page, (0.5, 0.5), (0.55, 0.6), button="right")
    moved = page.evaluate("paintCanvases.img2maskimg.view")
    box = page.locator(f"{CANVAS} .paint-area").bounding_box()
    assert (moved["x"] - view["x"], moved["y"] - view["y"]) == pytest.approx((0.05 * box["width"], 0.1 * box["height"]), abs=1.5)
    assert mask_of(page).getbbox() == (left, top, right, bottom)
    page.keyboard.press("r")
    assert page.evaluate("paintCanvases.img2maskimg.view.scale") == pytest.approx(before["scale"])
    page.keyboard.press("]")
    assert page.evaluate("paintCanvases.img2maskimg.size") > 24
    page.locator(f"{CANVAS} .paint-size").fill("500")
    assert page.inner_text(f"{CANVAS} .paint-size-text") == "500 px"
    page.locator(f"{CANVAS} .paint-area").focus()
    page.keyboard.press("f")
    assert page.locator(f"{CANVAS} .paint-frame").bounding_box()["height"] == 900
    page.keyboard.press("Escape")
    page.keyboard.press("Delete")
    assert page.evaluate(PAINTED) is None


def test_a_painted_mask_makes_a_picture_and_a_copy_of_it_can_be_painted_on(page: Any, site: Site, tmp_path: Path) -> None:
    source = tmp_path / "source.png"
    source.write_bytes(base64.b64decode(png_base64(color="red", size=(64, 64))))
    show_img2img(page)
    page.click("#img2img_inpaint_tab-button")
    page.set_input_files(f"{CANVAS} input[type=file]", str(source))
    page.wait_for_function("paintCanvases.img2maskimg.layer.width === 64")
    page.evaluate("paintCanvases.img2maskimg.setSize(10)")
    set_number(page, "img2img_mask_blur", 0)
    set_number(page, "img2img_steps", 2)
    drag(page, (0.5, 0.5), (0.51, 0.5))
    generate(page, "img2img")
    with Image.open(newest_picture(site, "img2img-images")) as made:
        assert made.convert("RGB").getpixel((2, 2)) == pytest.approx((255, 0, 0), abs=3)  # not masked: as it was
        assert made.convert("RGB").getpixel((32, 32)) != (255, 0, 0)
    page.click("#img2img_copy_to_inpaint button:text-is('sketch')")
    page.wait_for_function("paintCanvases.img2img_sketch && paintCanvases.img2img_sketch.layer.width === 64")
    page.evaluate("document.querySelector('#img2img_sketch .paint-remove').click()")
    page.click("#img2img_inpaint_tab-button")
    page.click(f"{CANVAS} .paint-remove")
    assert page.input_value(f"{CANVAS}_value textarea") == ""
