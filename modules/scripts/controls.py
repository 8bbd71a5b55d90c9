"""Controls of scripts on the page: built script by script, plus the Script dropdown for scripts that are not part of the tab.

Must not know tabs: a tab's builder calls this at the right place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from modules.infotext.parameters import PasteField
from modules.launch.guest_calls import call_guest, end_of_path
from modules.scripts.arguments import start_value
from modules.scripts.base import Script

if TYPE_CHECKING:
    from modules.scripts.runner import ScriptRunner

QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
NO_SCRIPT = "None"


@dataclass(frozen=True, kw_only=True)
class ArgInfo:
    """One argument of a script, as reported by /script-info."""

    label: str | None = None
    value: Any = None
    minimum: Any = None
    maximum: Any = None
    step: Any = None
    choices: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class ScriptInfo:
    """A script, as reported by /script-info."""

    name: str | None = None
    is_alwayson: bool = False
    is_img2img: bool = False
    args: list[ArgInfo] = field(default_factory=list)


def build_script(runner: ScriptRunner, script: Script) -> None:
    """Build the script's controls in the current gradio context. A script that fails is dropped from the tab."""
    first = len(runner.inputs)
    script.args_from = script.args_to = first
    group = gr.Group(visible=script.alwayson, elem_classes=["script-group"]) if script.create_group else gr.Column(elem_classes=["script-group"])
    task = f"Script {script.title()!r} ({end_of_path(script.filename)}) could not build its controls; the page and the API continue without it"
    with group:
        well, controls = call_guest(lambda: _controls_of(script), task)
    if not well:
        group.unrender()
        runner.drop(script)
        return
    if not group.children:
        group.unrender()  # an empty group would show as a line
    script.group = group if script.create_group and group.children else None
    script.name = re.sub(r"[^a-z_0-9 ]+", "", str(script.title()).lower())
    script.controls = controls
    for control in controls:
        control.custom_script_source = Path(script.filename or "").name
    script.api_info = ScriptInfo(
        name=str(script.title()).lower(), is_alwayson=script.alwayson, is_img2img=bool(script.is_img2img), args=[_describe(item) for item in controls]
    )
    runner.infotext_fields += script.infotext_fields or ()
    runner.paste_field_names += script.paste_field_names or ()
    runner.inputs += controls
    script.args_to = len(runner.inputs)


def build_aside(build: Callable[[], Any], task: str) -> tuple[bool, Any]:
    """Like call_guest, but removes from the page whatever a failing `build` had already added."""
    with gr.Column(elem_classes=["settings-part"]) as column:
        well, controls = call_guest(build, task)
    if not (well and column.children):
        column.unrender()
    return well, controls


def _controls_of(script: Script) -> list[Component]:
    controls = list(script.ui(bool(script.is_img2img)) or ())
    wrong = [control for control in controls if not isinstance(control, Component)]
    if wrong:
        raise TypeError(f"ui() returned {type(wrong[0]).__name__}; it must return a list of gradio components")
    return controls


def build_dropdown(runner: ScriptRunner) -> None:
    """The Script dropdown and the controls of its scripts, shown when selected."""
    visible: Any = True if runner.titles else "hidden"
    choices = [NO_SCRIPT, *runner.titles]
    dropdown = gr.Dropdown(
        label="Script",
        elem_id="script_list",
        choices=choices,
        value=NO_SCRIPT,
        type="index",
        visible=visible,
    )
    runner.inputs[0] = dropdown
    runner.setup_ui_for_section(None, list(runner.selectable_scripts))
    shown = list(runner.selectable_scripts)
    runner.titles[:] = [str(script.title()) for script in shown]
    dropdown.choices = [(title, title) for title in (NO_SCRIPT, *runner.titles)]
    groups = [(number, script.group) for number, script in enumerate(shown, start=1) if script.group is not None]

    def show_selected(index: int | None) -> Any:
        updates = [gr.update(visible=number == index) for number, _ in groups]
        return updates if len(updates) > 1 else updates[0]

    if groups:
        dropdown.change(show_selected, inputs=[dropdown], outputs=[group for _, group in groups], **QUIET)
    runner.infotext_fields.append(PasteField(dropdown, lambda params: params.get("Script", NO_SCRIPT)))


def _describe(control: Component) -> ArgInfo:
    choices = getattr(control, "choices", None)
    return ArgInfo(
        label=str(control.label or ""),
        value=start_value(control),
        minimum=getattr(control, "minimum", None),
        maximum=getattr(control, "maximum", None),
        step=getattr(control, "step", None),
        choices=None if choices is None else [str(choice[0] if isinstance(choice, (tuple, list)) else choice) for choice in choices],
    )
