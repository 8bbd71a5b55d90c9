"""Start values, localization files, and the order of parts and tabs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from modules.ui.load_save import StartValues, changes_html, is_storable
from modules.ui.localization import find_localizations, read_localization
from modules.ui.part_order import PartOrder, arrange_tabs


def build(file: Path) -> tuple[StartValues, dict[str, Any]]:
    with gr.Blocks(analytics_enabled=False), gr.Tab("T") as tab, gr.Row():
        fields = {
            "steps": gr.Slider(1, 150, 20, step=1, label="Steps"),
            "method": gr.Dropdown(["Euler", "Heun"], value="Euler", label="Method"),
            "mode": gr.Radio(["a", "b"], value="a", label="Mode"),
            "words": gr.Textbox("", label="Words"),
            "on": gr.Checkbox(False, label="On"),
            "again": gr.Number(3, label="Steps"),
        }
        gr.Textbox("secret", label="Hidden", visible=False)
        gr.HTML("x")
    values = StartValues(file)
    values.add_tab("txt2img", tab)
    return values, fields


def test_fields_start_with_the_values_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "ui-config.json"
    entries = {"Steps/value": 33, "Steps/maximum": 300, "Method/value": "Heun", "Mode/value": "b", "Words/value": "cat", "On/value": True}
    file.write_text(json.dumps({f"txt2img/{key}": value for key, value in entries.items()}))
    values, fields = build(file)
    assert list(values.fields) == [f"txt2img/{name}" for name in ("Steps", "Method", "Mode", "Words", "On")]
    assert [fields[name].value for name in ("steps", "method", "mode", "words", "on", "again")] == [33, "Heun", "b", "cat", True, 3]
    assert fields["steps"].maximum == 300


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Steps/value", "many"),
        ("Steps/value", True),
        ("Steps/maximum", "x"),
        ("Steps/maximum", 0),
        ("Steps/step", -1),
        ("Mode/value", "c"),
        ("Method/value", "nothing"),
        ("Words/value", {"a": 1}),
        ("Words/value", "x" * 50_000),
        ("On/value", ["x"]),
    ],
)
def test_an_entry_that_does_not_fit_is_ignored_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, value: Any) -> None:
    (tmp_path / "ui-config.json").write_text(json.dumps({f"txt2img/{key}": value}))
    _, fields = build(tmp_path / "ui-config.json")
    own = (
        fields["steps"].value,
        fields["steps"].minimum,
        fields["steps"].maximum,
        fields["steps"].step,
        fields["mode"].value,
        fields["method"].value,
    )
    assert own == (20, 1, 150, 1, "a", "Euler")
    if key != "On/value":
        assert "ui-config.json" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", "", "\0", '{"txt2img/Steps/value": 1e999}'])
def test_a_damaged_file_costs_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "ui-config.json").write_text(content)
    assert build(tmp_path / "ui-config.json")[1]["steps"].value == 20


def test_what_differs_is_shown_saved_and_taken_back(tmp_path: Path) -> None:
    file = tmp_path / "ui-config.json"
    file.write_text(json.dumps({"img2img/Other/value": 5, "txt2img/Steps/maximum": 200}))
    values, _ = build(file)
    now = {"txt2img/Steps": 40, "txt2img/Method": "Euler", "txt2img/Words": "<b>", "txt2img/On": None, "unknown/x": 1}
    assert values.save(now) == {"txt2img/Steps": (20, 40), "txt2img/Words": ("", "<b>")}
    assert build(file)[1]["steps"].value == 40
    assert json.loads(file.read_text())["img2img/Other/value"] == 5
    assert "&lt;b&gt;" in changes_html(values.changes(now))
    assert values.forget() == 3
    assert json.loads(file.read_text()) == {"txt2img/Steps/maximum": 200}
    assert not is_storable(object()) and not is_storable([[1]])


def test_localization_files_are_tables_of_texts(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "de.json").write_text(json.dumps({"Steps": "Schritte", "Seed": "", "X": 3}))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "de.json").write_text("{}")
    (tmp_path / "two" / "bad.json").write_text("[1]")
    found = find_localizations([tmp_path / "one", tmp_path / "two", tmp_path / "none"])
    assert {name: read_localization(file) for name, file in found.items()} == {"de": {"Steps": "Schritte"}, "bad": {}}


def test_parts_and_tabs_are_put_in_the_wanted_order() -> None:
    with gr.Blocks(analytics_enabled=False):
        with gr.Column() as column:
            order = PartOrder(column)
            for name in ("sampler", "cfg", "seed"):
                with order.part(name):
                    gr.HTML(name)
                    gr.HTML(f"{name} too")
        with gr.Tabs() as tabs:
            for title in ("A", "B", "Settings"):
                gr.Tab(title, id=title.lower())
    order.arrange(["seed", "unknown", "sampler"])
    assert [child.value for child in column.children] == ["seed", "seed too", "sampler", "sampler too", "cfg", "cfg too"]
    arrange_tabs(tabs, order=["settings", "B"], hidden=["b", "Settings"])
    assert [(tab.label, tab.visible) for tab in tabs.children] == [("Settings", True), ("B", False), ("A", True)]
    assert tabs.selected == "settings"
