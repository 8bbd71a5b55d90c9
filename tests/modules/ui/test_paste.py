from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from modules.application import Application
from modules.ui import paste
from modules.ui.paste import Paster, PasteTarget
from tests.support.applications import installed_application

INFOTEXT = """a red circle, blue sky
Negative prompt: text
Steps: 12, Sampler: euler a, Schedule type: Karras, CFG scale: 5.5, Seed: 42, Size: 64x128, \
Variation seed: 7, Variation seed strength: 0.25, Clip skip: 2"""


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        yield app


@pytest.fixture
def paster(app: Application) -> Paster:
    with gr.Blocks(analytics_enabled=False):
        controls: dict[str, Any] = {
            "prompt": gr.Textbox(),
            "negative_prompt": gr.Textbox(),
            "steps": gr.Slider(1, 150, 20),
            "sampler_name": gr.Dropdown(["Euler a", "Euler"], value="Euler"),
            "scheduler": gr.Dropdown(["Automatic", "Karras"], value="Automatic"),
            "cfg_scale": gr.Slider(1, 30, 7),
            "seed": gr.Number(-1),
            "width": gr.Slider(64, 2048, 512),
            "height": gr.Slider(64, 2048, 512),
            "subseed": gr.Number(-1),
            "subseed_strength": gr.Slider(0, 1, 0),
        }
        target = PasteTarget(tab="txt2img", controls=controls, extra_seeds=gr.Checkbox(), override_settings=gr.Dropdown([], multiselect=True))
    return Paster(app, target)


def pasted(paster: Paster, text: str, *, sent: bool = False) -> dict[str, Any]:
    """New values by name; None if nothing changes."""
    updates = paster.updates(text, sent=sent)
    assert len(updates) == len(paster.outputs())
    names = [*paster.target.controls, "extra_seeds", "override_settings"]
    return {name: update.get("value") for name, update in zip(names, updates)}


def test_parameters_fill_the_controls_in_their_own_types(paster: Paster) -> None:
    values = pasted(paster, INFOTEXT)
    assert values == {
        "prompt": "a red circle, blue sky",
        "negative_prompt": "text",
        "steps": 12,
        "sampler_name": "Euler a",
        "scheduler": "Karras",
        "cfg_scale": 5.5,
        "seed": 42,
        "width": 64,
        "height": 128,
        "subseed": 7,
        "subseed_strength": 0.25,
        "extra_seeds": True,
        "override_settings": ["Clip skip: 2"],
    }


def test_settings_that_do_not_differ_are_not_overridden(paster: Paster, app: Application) -> None:
    app.options.set("CLIP_stop_at_last_layers", 2)
    assert pasted(paster, INFOTEXT)["override_settings"] == []


def test_values_out_of_range_stop_at_its_end_and_unknown_samplers_change_nothing(paster: Paster) -> None:
    values = pasted(paster, "x\nSteps: 9999, Sampler: Nothing like it, CFG scale: nan, Seed: 1, Size: 32x8192")
    assert (values["steps"], values["sampler_name"], values["cfg_scale"], values["width"], values["height"]) == (150, None, None, 64, 2048)


def test_empty_text_changes_nothing(paster: Paster) -> None:
    assert set(pasted(paster, "  ").values()) == {None}


def test_options_say_whether_size_and_seed_are_sent_along(paster: Paster, app: Application) -> None:
    app.options.set("send_size", False)
    app.options.set("send_seed", False)
    values = pasted(paster, INFOTEXT, sent=True)
    assert [values[name] for name in ("width", "height", "seed", "subseed", "extra_seeds")] == [None] * 5
    assert values["steps"] == 12
    assert pasted(paster, INFOTEXT)["seed"] == 42


def test_paste_button_reads_the_last_pictures_parameters_when_the_prompt_is_empty(paster: Paster, app: Application) -> None:
    app.config.data_dir.mkdir(parents=True, exist_ok=True)
    (app.config.data_dir / "params.txt").write_text(INFOTEXT)
    updates = paster.paste("")
    assert updates[0]["value"] == "a red circle, blue sky"
    assert paster.paste("other\nSteps: 1, Sampler: Euler, Seed: 2")[0]["value"] == "other"


def test_paste_button_without_anything_to_paste(paster: Paster, capsys: pytest.CaptureFixture[str]) -> None:
    assert {update.get("value") for update in paster.paste("")} == {None}
    assert "Nothing to paste" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("control", "value", "expected"),
    [
        (gr.Checkbox, "True", True),
        (gr.Checkbox, "no", False),
        (lambda: gr.Dropdown(["a", "b"], multiselect=True), ["a", "zzz"], ["a"]),
        (lambda: gr.Dropdown(["a"], allow_custom_value=True), "zzz", "zzz"),
        (gr.Number, "3.5", 3.5),
        (gr.Number, "text", None),
        (gr.Textbox, 5, "5"),
    ],
)
def test_values_fit_their_controls(control: Any, value: Any, expected: Any) -> None:
    with gr.Blocks(analytics_enabled=False):
        assert paste.value_for(control(), value) == expected
