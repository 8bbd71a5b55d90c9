"""What a user does on the page, and what the page is expected to show. Every look at the page waits for what it asserts: the page answers late."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.browser.conftest import Site

ANSWER_TIMEOUT_MS = 120_000  # a machine that is busy with something else is slow, not broken
STILL_LOOKS_MAX = 60
STILL_PAUSE_MS = 250
WINDOW = {"width": 1440, "height": 900}
START = "start over\nNegative prompt: nothing\nSteps: 2, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: -1, Size: 64x64"
GALLERY_IMAGE = "#{tab}_gallery .preview img[data-testid=detailed-image]"


def expected(page: Any, selector: str) -> Any:
    """playwright's assertions on the one element that `selector` finds; each waits until it holds."""
    from playwright.sync_api import expect  # an optional package

    expect.set_options(timeout=ANSWER_TIMEOUT_MS)
    return expect(page.locator(selector))


def open_page(page: Any, site: Site, query: str = "", *, until_first_values: bool = True) -> Any:
    """Load the page and wait until its scripts have set it up and the server has said what its lists and numbers are now. Returns `page`."""
    page.goto(f"{site.address}/{query}")
    wait_until_loaded(page)
    if until_first_values:
        expect_value(page, "#first_values textarea", re.compile("."))
        wait_until_drawn(page)
    return page


def start_over(page: Any) -> None:
    """Put a page that other tests have used back to txt2img with START's values, by its own paste button. Pictures and open accordions stay."""
    page.set_viewport_size(WINDOW)
    show_tab(page, "txt2img")
    page.click("#txt2img_generation_tab-button")
    page.fill("#txt2img_prompt textarea", START)
    page.click(".txt2img-paste")
    expect_value(page, "#txt2img_prompt textarea", START.partition("\n")[0])
    expect_number(page, "txt2img_steps", 2)
    set_number(page, "txt2img_batch_count", 1)
    if page.is_checked("#txt2img_hr-checkbox input"):
        page.click("#txt2img_hr-visible-checkbox")
        expected(page, "#txt2img_hr-checkbox input").not_to_be_checked()
    page.evaluate("window.numAnswers = 0")


def wait_until_loaded(page: Any) -> None:
    """Also begins to count the answers that Generate gets."""
    page.wait_for_function("typeof uiIsLoaded !== 'undefined' && uiIsLoaded && optionsAreAvailable")
    page.evaluate("() => { window.numAnswers = 0; const before = taskAnswered; taskAnswered = (tab) => { before(tab); window.numAnswers += 1; }; }")


def show_img2img(page: Any) -> None:
    """The tab as it is at first: one picture, at the checkpoint's size."""
    show_tab(page, "img2img")
    page.click("#img2img_img2img_tab-button")
    page.click("#img2img_tab_resize_to-button")
    for side in ("width", "height"):
        set_number(page, f"img2img_{side}", 64)


def put_picture(page: Any, elem_id: str, path: Path | str) -> None:
    """Upload a picture, in the place of one that is there."""
    clear_picture(page, elem_id)
    page.set_input_files(f"{elem_id} input[type=file]", str(path))
    page.wait_for_selector(f"{elem_id} img")


def clear_picture(page: Any, elem_id: str) -> None:
    """Take away the picture that an earlier test left."""
    clear = page.locator(f"{elem_id} button[aria-label='Remove Image']")
    if clear.count():
        clear.first.click()
        page.wait_for_selector(f"{elem_id} img", state="detached")


def show_tab(page: Any, name: str) -> None:
    page.click(f"#tab_{name}-button")
    page.wait_for_selector(f"#tab_{name}", state="visible")


def set_number(page: Any, elem_id: str, value: float) -> None:
    """Type into a number field or a slider's number."""
    box = page.locator(f"#{elem_id} input[type=number]")
    box.fill(str(value))
    box.press("Tab")
    expect_number(page, elem_id, value)


def number(page: Any, elem_id: str) -> float:
    """What the field shows now; for a value that is about to arrive see `expect_number`."""
    return float(page.input_value(f"#{elem_id} input[type=number]"))


def expect_number(page: Any, elem_id: str, value: float) -> None:
    expected(page, f"#{elem_id} input[type=number]").to_have_value(re.compile(rf"^{re.escape(f'{value:g}')}(\.0+)?$"))


def expect_value(page: Any, selector: str, value: str | re.Pattern[str]) -> None:
    """The input or text area `selector` shows `value`."""
    expected(page, selector).to_have_value(value)


def expect_text(page: Any, selector: str, *parts: str) -> None:
    """The text of the one element `selector` contains every one of `parts`."""
    for part in parts:
        expected(page, selector).to_contain_text(part, use_inner_text=True)


def expect_count(page: Any, selector: str, count: int) -> None:
    expected(page, selector).to_have_count(count)


def generate(page: Any, tab: str = "txt2img") -> None:
    """Press Generate and wait for the answer."""
    page.click(f"#{tab}_generate")
    wait_for_answer(page, tab)


def wait_for_answer(page: Any, tab: str = "txt2img") -> None:
    """Until the server has answered and the page has drawn what it said."""
    page.wait_for_function("window.numAnswers > 0")
    page.evaluate("window.numAnswers = 0")
    page.wait_for_selector(f"#{tab}_generate", state="visible")
    wait_until_drawn(page)


def wait_until_drawn(page: Any) -> None:
    """Two frames: what the page's state says now is in its elements then. (One answer's values are all drawn at once.)"""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def infotexts(page: Any, tab: str = "txt2img") -> list[str]:
    """Parameters of the pictures of the last answer; after `wait_for_answer`."""
    return list(json.loads(page.input_value(f"#generation_info_{tab} textarea"))["infotexts"])


def shown_picture(page: Any, tab: str = "txt2img") -> str:
    """The address of the large picture, once it is loaded."""
    selector = GALLERY_IMAGE.format(tab=tab)
    page.wait_for_function("selector => (document.querySelector(selector) || {}).naturalWidth > 0", arg=selector)
    return str(page.get_attribute(selector, "src"))


def newest_picture(site: Site, kind: str) -> Path:
    return max(site.app.config.outputs_dir.glob(f"{kind}/**/*.png"), key=lambda path: path.stat().st_mtime_ns)


def wait_for_picture_on_canvas(page: Any, editor: str) -> None:
    """Until the picture editor `editor` shows a picture that no longer moves."""
    page.wait_for_selector(f"{editor} canvas")
    page.wait_for_selector(f"{editor} .empty", state="detached")
    wait_until_still(page, f"{editor} canvas")


def wait_until_still(page: Any, selector: str, *, other_than: bytes = b"") -> None:
    """Until two looks in a row at the element are the same, and not `other_than`. For a canvas, which says nothing of when it is done."""
    before = b""
    for _ in range(STILL_LOOKS_MAX):
        now = page.locator(selector).first.screenshot()
        if now == before and now != other_than:
            return
        before = now
        page.wait_for_timeout(STILL_PAUSE_MS)
    raise AssertionError(f"{selector} still changes, or never changed, after {STILL_LOOKS_MAX} looks")


def paint(page: Any, editor: str, *, by: tuple[int, int]) -> None:
    """One stroke from the middle of the editor's canvas."""
    box = page.locator(f"{editor} canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    unpainted = page.locator(f"{editor} canvas").first.screenshot()
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + by[0], y + by[1], steps=5)
    page.mouse.up()
    wait_until_still(page, f"{editor} canvas", other_than=unpainted)
