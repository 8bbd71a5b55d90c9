"""What extensions' scripts and people's habits find on the page: names, selectors, classes, files, menus, and what a reload leaves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.actions import (
    expect_count,
    expect_number,
    expect_value,
    expected,
    generate,
    open_page,
    set_number,
    show_tab,
    wait_for_answer,
    wait_until_loaded,
)
from tests.browser.conftest import Site, put_checkpoint, serve
from tests.support.extensions import write_extension

PROMPT = "#txt2img_prompt textarea"
GUEST = {
    "scripts/guest.py": """
        import gradio as gr
        from modules import scripts

        class Guest(scripts.Script):
            def title(self):
                return "Guest"

            def show(self, is_img2img):
                return scripts.AlwaysVisible

            def ui(self, is_img2img):
                with gr.Accordion("Guest", open=True, elem_id=self.elem_id("box")):
                    strength = gr.Slider(0, 1, label="Strength", elem_id=self.elem_id("strength"))
                    words = gr.Textbox(label="Words", elem_id=self.elem_id("words"))
                return [strength, words]

            def process(self, p, strength, words):
                p.extra_generation_params["Guest words"] = repr(words)
    """,
    "javascript/guest.js": """
        onUiLoaded(() => {
            window.guestSaw = {
                prompt: gradioApp().querySelector("#txt2img_prompt > label > textarea") !== null,
                option: typeof opts.samples_save,
                tab: uiCurrentTab !== null,
            };
            appendContextMenuOption("#txt2img_generate", "Guest's entry", () => { window.guestPressed = true; });
        });
    """,
    "tags/words.csv": "cat,1\n",
}
GLOBALS = """
opts uiCurrentTab uiUpdateCallbacks uiAfterUpdateCallbacks uiLoadedCallbacks uiTabChangeCallbacks optionsChangedCallbacks
optionsAvailableCallbacks localization activePromptTextarea gradioApp get_uiCurrentTab get_uiCurrentTabContent onUiLoaded onUiUpdate
onAfterUiUpdate onUiTabChange onOptionsChanged onOptionsAvailable updateInput onEdit request requestGet requestProgress randomId submit
create_submit_args args_to_array appendContextMenuOption removeContextMenuOption addContextMenuEventListener contextMenuInit formatTime pad2
isMobile isURL isValidImageList uiElementIsVisible uiElementInSight sleepUntil toggleCss get_tab_index create_tab_index_args
get_img2img_tab_index switch_to_img2img_tab switchWidthHeight confirm_clear_prompt setSubmitButtonsVisibility getTranslation hasLocalization
textNodesUnder executeCallbacks popup closePopup
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    data_dir = Path(tmp_path_factory.mktemp("surface"))
    put_checkpoint(data_dir)
    write_extension(data_dir / "extensions", "guest", GUEST)
    with serve(data_dir, "sd_forge_lora") as site:
        yield site


def test_every_global_is_a_property_of_window_and_acts(page: Any, site: Site) -> None:
    assert page.evaluate("names => names.filter(name => !(name in window))", GLOBALS.split()) == []
    facts = page.evaluate(
        """async () => {
            toggleCss("guest-css", "#footer { display: none; }", true);
            const hidden = !uiElementIsVisible(document.getElementById("footer"));
            toggleCss("guest-css", "", false);
            localization.Steps = "Schritte";
            const listing = await new Promise((done, failed) => requestGet("./internal/ping", {a: 1}, done, failed)).catch(String);
            return {
                hidden, listing: typeof listing,
                shown: [uiElementIsVisible, uiElementInSight].every(is => is(document.getElementById("txt2img_generate"))),
                translated: [hasLocalization(), getTranslation("Steps"), getTranslation("None of these")],
                waited: [await sleepUntil(() => true, 1000), await sleepUntil(() => false, 60)],
                texts: [isURL("https://a.b/c"), isURL("no"), pad2(7), formatTime(75), args_to_array({0: "a", length: 1})],
                tab: get_tab_index("tabs"), inner: get_tab_index("mode_img2img"),
            };
        }"""
    )
    assert facts == {
        "hidden": True,
        "listing": "object",
        "shown": True,
        "translated": [True, "Schritte", None],
        "waited": [True, False],
        "texts": [True, False, "07", "01:15", ["a"]],
        "tab": 0,
        "inner": 0,
    }
    page.evaluate("switch_to_img2img_tab(2)")
    page.wait_for_function("get_tab_index('tabs') === 1 && get_tab_index('mode_img2img') === 2")
    page.evaluate("switchWidthHeight('img2img'); delete localization.Steps")


def test_selectors_and_classes_of_the_old_page_find_what_they_mean(page: Any, site: Site) -> None:
    assert page.evaluate("window.guestSaw") == {"prompt": True, "option": "boolean", "tab": True}
    found = page.evaluate(
        """() => ({
            prompts: ["txt2img", "img2img"].map(tab => document.querySelector(`#${tab}_prompt > label > textarea`).tagName),
            tabs: Array.from(gradioApp().querySelectorAll("#tabs > .tab-nav > button"), button => button.textContent.trim()).slice(0, 2),
            selected: document.querySelector("#tabs > div.tab-nav > button.selected").textContent.trim(),
            inner: document.querySelectorAll("#txt2img_extra_tabs > .tab-nav > button").length > 1,
            nothing: [document.querySelector("#nowhere > label > textarea"), document.querySelectorAll("#nowhere > .tab-nav > button").length],
            kinds: ["slider", "dropdown", "checkbox", "textbox", "row", "column", "html", "gallery", "accordion", "button"].filter(
                kind => !document.querySelector(`.gradio-${kind}`)),
            slider: document.querySelector("#txt2img_steps").classList.contains("gradio-slider"),
            tool: document.querySelector("#txt2img_res_switch_btn").matches(".gradio-button.tool"),
            guest: document.querySelector(".block.gradio-accordion #script_txt2img_guest_strength") !== null,
        })"""
    )
    assert found == {
        "prompts": ["TEXTAREA", "TEXTAREA"],
        "tabs": ["Txt2img", "Img2img"],
        "selected": "Txt2img",
        "inner": True,
        "nothing": [None, 0],
        "kinds": [],
        "slider": True,
        "tool": True,
        "guest": True,
    }


def test_files_of_an_extension_are_served_and_its_empty_text_is_a_text(page: Any, site: Site) -> None:
    for begin in ("file=", "gradio_api/file="):
        answer = page.request.get(f"{site.address}/{begin}extensions/guest/tags/words.csv?1")
        assert (answer.status, answer.text()) == (200, "cat,1\n")
        assert page.request.get(f"{site.address}/{begin}config.json").status in (403, 404)
    set_number(page, "txt2img_steps", 1)
    generate(page)
    expected(page, "#html_info_txt2img").to_contain_text("Guest words: ''")


def test_what_was_typed_survives_a_reload_and_a_restart(new_page: Any, site: Site) -> None:
    page = open_page(new_page, site)
    page.fill(PROMPT, "kept over a reload")
    page.fill("#txt2img_neg_prompt textarea", "not this")
    set_number(page, "txt2img_steps", 33)
    set_number(page, "txt2img_width", 256)
    page.reload()
    wait_until_loaded(page)
    expect_what_was_typed(page)
    page.route("**/gradio_api/app_id", lambda route: route.fulfill(json={"app_id": 17}))  # another server answers in its place
    page.evaluate("window.isOldPage = true; restart_reload()")
    page.wait_for_function("!window.isOldPage")
    page.unroute("**/gradio_api/app_id")
    wait_until_loaded(page)
    expect_what_was_typed(page)


def expect_what_was_typed(page: Any) -> None:
    expect_value(page, PROMPT, "kept over a reload")
    expect_value(page, "#txt2img_neg_prompt textarea", "not this")
    expect_number(page, "txt2img_steps", 33)
    expect_number(page, "txt2img_width", 256)


def test_nothing_is_kept_when_the_setting_says_so(new_page: Any, site: Site) -> None:
    site.app.options.keep_values_in_browser = False
    try:
        page = open_page(new_page, site)
        page.wait_for_function("opts.keep_values_in_browser === false")
        page.fill(PROMPT, "forgotten")
        page.reload()
        wait_until_loaded(page)
        expect_value(page, "#first_values textarea", re.compile("."))
        expect_value(page, PROMPT, "")
        assert page.evaluate("sessionStorage.getItem('kept_values')") is None
    finally:
        site.app.options.keep_values_in_browser = True


def test_menus_of_a_right_click_and_generating_forever(page: Any, site: Site) -> None:
    page.click("#txt2img_generate", button="right")
    page.click("#context-menu >> text=Guest's entry")
    page.wait_for_function("window.guestPressed === true")
    expect_count(page, "#context-menu", 0)
    set_number(page, "txt2img_steps", 1)
    page.click("#txt2img_generate", button="right")
    page.click("#context-menu >> text='Generate forever'")
    wait_for_answer(page)
    page.wait_for_function("window.numAnswers > 1")
    page.click("#txt2img_generate_box", button="right")
    page.evaluate("cancelGenerateForever('txt2img')")
    page.keyboard.press("Escape")
    expect_count(page, "#context-menu", 0)
    page.wait_for_selector("#txt2img_generate", state="visible")


def test_the_gallery_stays_in_its_place_when_a_job_begins(page: Any, site: Site) -> None:
    top = "document.querySelector('#txt2img_gallery_container').getBoundingClientRect().top"
    before = page.evaluate(top)
    set_number(page, "txt2img_steps", 100)
    page.click("#txt2img_generate")
    page.wait_for_selector("#txt2img_results .progressDiv")
    assert page.evaluate(top) == pytest.approx(before, abs=1)
    page.click("#txt2img_interrupt")
    wait_for_answer(page)


@pytest.mark.parametrize(("theme", "is_dark"), [("dark", True), pytest.param("light", False, marks=pytest.mark.nightly)])
def test_the_theme_of_the_address_colors_scrollbars_and_boxes(new_page: Any, site: Site, theme: str, is_dark: bool) -> None:
    page = open_page(new_page, site, f"?__theme={theme}")
    facts = "[document.body.classList.contains('dark'), getComputedStyle(document.documentElement).colorScheme === 'dark']"
    page.wait_for_function(f"wanted => {facts}.every(fact => fact === wanted)", arg=is_dark)


# the Settings tab has hundreds of controls: what comes after it is slow


@pytest.mark.parametrize("height", [768, 900, 1080])
def test_every_page_of_the_settings_can_be_scrolled_to(page: Any, site: Site, height: int) -> None:
    page.set_viewport_size({"width": 1440, "height": height})
    show_tab(page, "settings")
    page.wait_for_selector("#settings > .tab-wrapper .tab-nav > button")
    outside = page.evaluate(
        """() => {
            const frame = document.querySelector("#settings > .tab-wrapper");
            return Array.from(frame.querySelectorAll(".tab-nav > button")).filter((button) => {
                button.scrollIntoView({block: "nearest"});
                const [outer, inner] = [frame.getBoundingClientRect(), button.getBoundingClientRect()];
                return inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1 || inner.bottom > window.innerHeight;
            }).map(button => button.textContent.trim());
        }"""
    )
    assert outside == []
    first = page.locator("#settings > .tab-wrapper .tab-nav > button").first
    first.click()
    expected(page, "#settings > .tab-wrapper .tab-nav > button >> nth=0").to_have_attribute("aria-selected", "true")


def test_every_button_says_what_it_does(page: Any, site: Site) -> None:
    for tab in ("txt2img", "img2img", "extras", "pnginfo", "settings"):
        show_tab(page, tab)
        nameless = """Array.from(document.querySelectorAll(".gradio-container button"), button => ({
            shown: button.getClientRects().length > 0,
            name: button.textContent.trim() || button.getAttribute("aria-label") || button.title,
            where: button.id || button.className,
        })).filter(button => button.shown && !button.name).map(button => button.where)"""
        page.wait_for_timeout(500)  # names are put on 200 ms after the page is quiet
        assert page.evaluate(nameless) == [], tab
