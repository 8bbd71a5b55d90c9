"""The top of a generation tab: prompts with token counters, Generate with Interrupt and Skip, prompt tools and styles.

Must not know how a picture is made; it returns its parts, and the tab connects them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from modules.ui.components import DropdownMulti, ToolButton
from modules.ui.style_dialog import StyleDialog, create_style_dialog

PROMPT_HINTS = {
    "prompt": "Prompt\n(Ctrl+Enter generates, Alt+Enter skips to the next picture, Esc interrupts)",
    "neg_prompt": "Negative prompt\n(what should not be in the picture)",
}


@dataclass(frozen=True, kw_only=True)
class Toprow:
    """The parts at the top of a tab.

    `prompt_image` takes pictures dropped on a prompt. `token_buttons` are (button, prompt, counter) for the prompt and the negative prompt."""

    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    submit: gr.Button
    interrupt: gr.Button
    skip: gr.Button
    interrupting: gr.Button
    paste: gr.Button
    clear_prompt: gr.Button
    apply_styles: gr.Button
    enqueue: gr.Button
    restore_progress: gr.Button
    prompt_image: gr.File
    styles: gr.Dropdown
    style_dialog: StyleDialog
    token_counters: tuple[tuple[gr.Textbox, gr.HTML, gr.Button], ...]


def _prompt_box(tab: str, name: str, row_name: str) -> gr.Textbox:
    with gr.Row(elem_id=f"{tab}_{row_name}_row", elem_classes=["prompt-row"]):
        return gr.Textbox(
            label=PROMPT_HINTS[name].split("\n")[0],
            elem_id=f"{tab}_{name}",
            show_label=False,
            lines=3,
            max_lines=20,
            placeholder=PROMPT_HINTS[name],
            elem_classes=["prompt"],
        )


def _token_counter(tab: str, infix: str) -> tuple[gr.HTML, gr.Button]:
    counter = gr.HTML(value="<span>0/75</span>", elem_id=f"{tab}_{infix}token_counter", elem_classes=["token-counter"])
    button = gr.Button(visible="hidden", elem_id=f"{tab}_{infix}token_button")
    return counter, button


def _prompts(tab: str) -> tuple[gr.Textbox, gr.Textbox, tuple[tuple[gr.Textbox, gr.HTML, gr.Button], ...]]:
    with gr.Column(elem_id=f"{tab}_prompt_container", elem_classes=["prompt-container"], scale=6):
        with gr.Column(elem_classes=["prompt-group"]):
            prompt = _prompt_box(tab, "prompt", "prompt")
            counter = _token_counter(tab, "")
        with gr.Column(elem_classes=["prompt-group"]):
            negative = _prompt_box(tab, "neg_prompt", "neg_prompt")
            negative_counter = _token_counter(tab, "negative_")
    return prompt, negative, ((prompt, *counter), (negative, *negative_counter))


def create_generate_box(tab: str) -> dict[str, gr.Button]:
    """Generate, and the buttons that replace it while a task of the tab runs."""
    with gr.Row(elem_id=f"{tab}_generate_box", elem_classes=["generate-box"]):
        return {
            "interrupt": gr.Button("Interrupt", elem_id=f"{tab}_interrupt", elem_classes=["generate-box-interrupt"]),
            "skip": gr.Button("Skip", elem_id=f"{tab}_skip", elem_classes=["generate-box-skip"]),
            "interrupting": gr.Button("Interrupting…", elem_id=f"{tab}_interrupting", elem_classes=["generate-box-interrupting"]),
            "submit": gr.Button("Generate", elem_id=f"{tab}_generate", variant="primary"),
        }


def _tools(tab: str) -> dict[str, gr.Button]:
    with gr.Row(elem_id=f"{tab}_tools", elem_classes=["prompt-tools"]):
        return {
            "paste": ToolButton(icon_name="paste", elem_id="paste", elem_classes=[f"{tab}-paste"]),
            "clear_prompt": ToolButton(icon_name="trash", elem_id=f"{tab}_clear_prompt"),
            "apply_styles": ToolButton(icon_name="apply", elem_id=f"{tab}_style_apply"),
            "enqueue": ToolButton(icon_name="enqueue", elem_id=f"{tab}_enqueue"),
            "restore_progress": ToolButton(icon_name="restore", elem_id=f"{tab}_restore_progress", elem_classes=["restore-progress"]),
        }


def create_toprow(tab: str, style_names: Sequence[str]) -> Toprow:
    """Build the top of tab `tab` ("txt2img" or "img2img")."""
    with gr.Row(elem_id=f"{tab}_toprow", elem_classes=["toprow"], equal_height=False):
        prompt, negative_prompt, token_counters = _prompts(tab)
        with gr.Column(elem_id=f"{tab}_actions_column", elem_classes=["actions-column"], scale=1, min_width=220):
            buttons: dict[str, Any] = {**create_generate_box(tab), **_tools(tab)}
            with gr.Row(elem_id=f"{tab}_styles_row", elem_classes=["styles-row"]):
                styles = DropdownMulti(
                    label="Styles", show_label=False, elem_id=f"{tab}_styles", choices=list(style_names), value=[], container=False
                )
                edit_styles = ToolButton(icon_name="edit", elem_id=f"{tab}_styles_edit_button")
    dialog = create_style_dialog(tab, style_names, edit_styles)
    dropped = gr.File(visible="hidden", elem_id=f"{tab}_prompt_image", label="Picture dropped on the prompt", file_count="single")
    buttons |= {"prompt_image": dropped, "styles": styles, "style_dialog": dialog}
    return Toprow(prompt=prompt, negative_prompt=negative_prompt, token_counters=token_counters, **buttons)
