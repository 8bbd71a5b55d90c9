from __future__ import annotations

import json

import gradio as gr
import pytest

from modules.ui import common


def test_text_as_html_keeps_lines_and_escapes_everything_else() -> None:
    assert common.plaintext_to_html("a <b>\nc & d") == "<p>a &lt;b&gt;<br>\nc &amp; d</p>"
    assert common.plaintext_to_html("x", "it's") == "<p class='it&#x27;s'>x</p>"


def test_error_html_escapes_the_message() -> None:
    assert "<script>" not in common.error_html("<script>alert(1)</script>")


@pytest.mark.parametrize(
    ("info", "index", "expected"),
    [
        (json.dumps({"infotexts": ["first", "second"]}), 1, "second"),
        (json.dumps({"infotexts": ["first", "second"]}), 7, "first"),
        (json.dumps({"infotexts": ["first", "second"]}), -1, "first"),
        (json.dumps({"infotexts": []}), 0, ""),
        ("not json", 0, ""),
        ("[1, 2]", 0, ""),
        ("", 0, ""),
    ],
)
def test_infotext_of_a_picture(info: str, index: int, expected: str) -> None:
    assert common.infotext_of(info, index) == expected


def test_selecting_a_picture_shows_its_parameters_and_keeps_the_old_ones_when_unknown() -> None:
    assert common.update_generation_info(json.dumps({"infotexts": ["a", "b"]}), "old", 1.0) == "<p class='infotext'>b</p>"
    assert common.update_generation_info("{}", "old", 0) == "old"


@pytest.mark.parametrize(
    ("gallery", "index", "expected"),
    [(None, 0, None), ([], 0, None), ([("a.png", None), ("b.png", None)], 1, "b.png"), (["a.png"], 5, "a.png"), (["a.png", "b.png"], -1, "a.png")],
)
def test_picture_of_a_gallery(gallery: list[object] | None, index: int, expected: str | None) -> None:
    assert common.picture_at(gallery, index) == expected


def test_refresh_button_gives_every_component_the_new_properties() -> None:
    calls = []
    with gr.Blocks(analytics_enabled=False) as demo:
        one, two = gr.Dropdown(choices=["a"]), gr.Dropdown(choices=["a"])
        button = common.create_refresh_button([one, two], lambda: calls.append(1), lambda: {"choices": ["x", "y"]}, "refresh_it")
    function = next(fn for fn in demo.fns.values() if fn.targets[0][0] == button._id)
    updates = function.fn()
    assert calls == [1]
    assert [update["choices"] for update in updates] == [["x", "y"]] * 2
    assert button.elem_id == "refresh_it"


def test_output_panel_has_the_ids_that_scripts_look_for() -> None:
    with gr.Blocks(analytics_enabled=False) as demo:
        panel = common.create_output_panel("txt2img")
    ids = {block.elem_id for block in demo.blocks.values()}
    assert ids >= {
        "txt2img_results",
        "txt2img_results_panel",
        "txt2img_gallery_container",
        "txt2img_gallery",
        "image_buttons_txt2img",
        "txt2img_open_folder",
        "save_txt2img",
        "save_zip_txt2img",
        "txt2img_send_to_img2img",
        "txt2img_send_to_inpaint",
        "txt2img_upscale",
        "download_files_txt2img",
        "html_info_txt2img",
        "html_log_txt2img",
        "generation_info_txt2img",
        "txt2img_generation_info_button",
    }
    assert panel.buttons["open_folder"].visible is False
