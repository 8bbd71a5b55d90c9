from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import pytest

from modules.application import Application
from modules.settings.inert import WHAT_IS_TRUE
from modules.settings.options import OptionHTML, OptionInfo, options_section
from modules.ui import settings
from modules.ui.settings import SettingsHandlers, SettingsTab
from tests.support.applications import installed_application

CHOICES = {"samplers": ["Euler a", "Euler"], "schedulers": ["Automatic"], "themes": ["Default"], "vaes": ["Automatic"]}


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        yield app


def build(app: Application) -> SettingsTab:
    with gr.Blocks(analytics_enabled=False), gr.Tab("Settings") as item:
        return settings.create_settings_tab(app, CHOICES, gr.Textbox(), item)


def handlers(app: Application, *keys: str) -> SettingsHandlers:
    return SettingsHandlers(app, list(keys))


def test_every_option_with_a_page_has_a_control_with_its_id_and_value(app: Application) -> None:
    tab = build(app)
    for key, info in app.options.data_labels.items():
        if key in WHAT_IS_TRUE:
            assert key not in tab.components  # a control that does nothing is not shown
        elif info.section and info.section[0] is not None and not info.do_not_save and key not in settings.OWNED_BY_QUICK_SETTINGS:
            assert tab.components[key].elem_id == f"setting_{key}"
            assert tab.components[key].value == getattr(app.options, key), key
    assert "sd_model_checkpoint" not in tab.components


def test_every_control_takes_its_own_value(app: Application) -> None:
    for key, control in build(app).components.items():
        control.preprocess(control.postprocess(control.value))
        assert control.label == app.options.data_labels[key].label


def test_controls_follow_the_table(app: Application) -> None:
    tab = build(app)
    assert isinstance(tab.components["samples_save"], gr.Checkbox)
    assert isinstance(tab.components["jpeg_quality"], gr.Slider)
    assert isinstance(tab.components["samples_filename_pattern"], gr.Textbox)
    assert isinstance(tab.components["samples_format"], gr.Dropdown)
    assert tab.components["sd_t2i_sampler"].choices[0][0] == "Euler a"


def test_options_of_extensions_appear_too(app: Application) -> None:
    options = options_section(
        ("mine", "My extension"),
        {
            "my_note": OptionHTML("Some <b>note</b>"),
            "my_number": OptionInfo(5, "A number", gr.Slider, {"minimum": 0, "maximum": 9, "step": 1}).info("explained"),
            "my_names": OptionInfo(["a"], "Names", gr.CheckboxGroup, lambda: {"choices": ["a", "b"]}),
        },
    )
    for key, info in options.items():
        app.options.add_option(key, info)
    tab = build(app)
    assert tab.components["my_number"].maximum == 9
    assert tab.components["my_names"].value == ["a"]
    assert "my_note" not in tab.components


def test_apply_keeps_what_was_changed(app: Application) -> None:
    text, result = handlers(app, "jpeg_quality", "samples_save", "font").apply(90, True, "")
    assert app.options.jpeg_quality == 90
    assert json.loads(text)["jpeg_quality"] == 90
    assert "1 setting changed: Quality of jpeg and avif files" in result
    assert json.loads(app.config.settings_file.read_text())["jpeg_quality"] == 90


def test_value_that_is_not_possible_is_named_and_the_others_are_kept(app: Application) -> None:
    _, result = handlers(app, "samples_format", "jpeg_quality").apply("tiff", 70)
    assert app.options.samples_format == "png"
    assert app.options.jpeg_quality == 70
    assert "samples_format" in result and "tiff" in result


def test_emptied_number_changes_nothing(app: Application) -> None:
    handlers(app, "target_side_length").apply(None)
    assert app.options.target_side_length == 4000


def test_frozen_settings_are_told(tmp_path: Path) -> None:
    with installed_application(tmp_path / "data", freeze_settings=True) as app:
        _, result = handlers(app, "jpeg_quality").apply(10)
        assert "freeze-settings" in result
        assert app.options.jpeg_quality != 10


def test_controls_are_filled_anew_only_when_a_setting_has_changed(app: Application) -> None:
    one = handlers(app, "jpeg_quality")
    shown = app.options.dumpjson()
    assert one.refresh(shown) == [gr.skip(), gr.skip()]
    app.options.set("jpeg_quality", 33)
    update, text = one.refresh(shown)
    assert update["value"] == 33
    assert json.loads(text)["jpeg_quality"] == 33


def test_search_finds_labels_and_keys_and_links_to_their_page(app: Application) -> None:
    one = handlers(app, "jpeg_quality", "webp_lossless")
    found = one.search("JPEG")
    assert "setting_jpeg_quality" in found and "settings_tab_saving-images_0" in found
    assert "webp" not in found
    assert one.search("j") == ""
    assert "No setting" in one.search("zzzz")


def test_models_are_unloaded_in_their_turn(app: Application) -> None:
    calls = []
    app.models.unload = lambda: calls.append(1)  # type: ignore[method-assign]
    assert "unloaded" in handlers(app).unload_models()
    assert calls == [1]
