from __future__ import annotations

from pathlib import Path

import gradio as gr
import pytest

from modules.ui import components
from modules.ui.components import DropdownMulti, FormRow, InputAccordion, ToolButton


def test_importing_writes_no_stub_beside_the_source() -> None:
    assert not Path(components.__file__).with_suffix(".pyi").exists()


def test_components_are_drawn_by_gradios_own_code_and_keep_their_properties() -> None:
    with gr.Blocks(analytics_enabled=False):
        button = ToolButton(icon_name="dice", elem_id="roll", elem_classes=["extra"])
        row = FormRow(elem_id="row", elem_classes="mine")
        many = DropdownMulti(label="Many", choices=["a", "b"], value=["a"])
    assert button.get_block_name() == "button"
    assert button.get_config()["elem_classes"] == ["tool", "icon", "icon-dice", "extra"]
    assert (row.get_block_name(), row.get_config()["elem_classes"]) == ("row", ["form-row", "mine"])
    assert (many.get_block_name(), many.get_config()["multiselect"], many.get_config()["label"]) == ("dropdown", True, "Many")


def test_tool_button_shows_its_value_when_it_has_no_icon() -> None:
    with gr.Blocks(analytics_enabled=False):
        button = ToolButton("+", elem_id="add")
    assert (button.value, button.get_config()["elem_classes"]) == ("+", ["tool"])


def test_input_accordion_is_a_checkbox_with_the_known_ids() -> None:
    with gr.Blocks(analytics_enabled=False) as demo, InputAccordion(False, label="Hires. fix", elem_id="txt2img_hr") as enabled:
        with enabled.extra():
            gr.HTML("from .. to ..")
        inside = gr.Slider(0, 1, 0.5)
    ids = [block.elem_id for block in demo.blocks.values()]
    assert {"txt2img_hr", "txt2img_hr-checkbox", "txt2img_hr-extra"} <= set(ids)
    assert enabled.value is False
    assert enabled.get_block_name() == "checkbox"
    assert inside.parent is not None


def test_input_accordions_without_id_get_different_ones() -> None:
    with gr.Blocks(analytics_enabled=False):
        one, two = InputAccordion(True, label="a"), InputAccordion(True, label="b")
    assert one.accordion_id != two.accordion_id
    assert one.value is True


def test_input_accordion_can_be_changed_by_an_event() -> None:
    with gr.Blocks(analytics_enabled=False):
        accordion = InputAccordion(False, label="Hires. fix", elem_id="txt2img_hr")
    changed = InputAccordion(**{**accordion.constructor_args, "value": True, "render": False})  # what gradio does for gr.update()
    assert (changed.value, changed.elem_id) == (True, "txt2img_hr-checkbox")
    with pytest.raises(RuntimeError, match="outside a page"):
        changed.__enter__()
