"""The dialog for writing, changing and deleting styles. modules/ui/styles.py connects it to the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from modules.errors import RequestError
from modules.prompts.styles import PromptStyle, apply_style
from modules.ui.components import FormRow, ToolButton
from modules.ui.paste import TOLD
from modules.ui.sections import HIDDEN_PART

if TYPE_CHECKING:
    from modules.application import Application

QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


@dataclass(frozen=True, kw_only=True)
class StyleDialog:
    """The parts of the dialog. `edit` is the button next to the styles field that opens it."""

    edit: gr.Button
    select: gr.Dropdown
    copy: gr.Button
    apply: gr.Button
    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    save: gr.Button
    delete: gr.Button
    close: gr.Button


def create_style_dialog(tab: str, style_names: Sequence[str], edit: gr.Button) -> StyleDialog:
    """Build the dialog of tab `tab`, hidden."""
    with gr.Column(elem_id=f"{tab}_styles_dialog", elem_classes=["style-dialog", HIDDEN_PART]), gr.Column(elem_classes=["style-window"]):
        with FormRow(elem_classes=["seed-row"]):
            select = gr.Dropdown(label="Style", choices=list(style_names), value=None, allow_custom_value=True, elem_id=f"{tab}_styles_edit_select")
            copy = ToolButton(icon_name="reuse", elem_id=f"{tab}_style_copy")
            apply = ToolButton(icon_name="apply", elem_id=f"{tab}_style_apply_dialog")
        hint = "{prompt} stands for the prompt; without it the text is appended"
        prompt = gr.Textbox(label="Prompt", lines=3, max_lines=12, elem_id=f"{tab}_edit_style_prompt", placeholder=hint)
        negative_prompt = gr.Textbox(label="Negative prompt", lines=3, max_lines=12, elem_id=f"{tab}_edit_style_neg_prompt", placeholder=hint)
        with gr.Row():
            save = gr.Button("Save", variant="primary", elem_id=f"{tab}_edit_style_save")
            delete = gr.Button("Delete", elem_id=f"{tab}_edit_style_delete")
            close = gr.Button("Close", elem_id=f"{tab}_edit_style_close")
    edit.click(fn=None, js=f"() => {{ showPart('{tab}_styles_dialog', true); }}", show_progress="hidden")
    close.click(fn=None, js=f"() => {{ showPart('{tab}_styles_dialog', false); }}", show_progress="hidden")
    return StyleDialog(
        edit=edit, select=select, copy=copy, apply=apply, prompt=prompt, negative_prompt=negative_prompt, save=save, delete=delete, close=close
    )


def style_texts(app: Application, name: str | None) -> tuple[Any, Any]:
    """(prompt, negative prompt) of style `name`; no change for an unknown name."""
    style = app.styles.styles.get((name or "").strip())
    return (style.prompt or "", style.negative_prompt or "") if style is not None else (gr.skip(), gr.skip())


def save_style(app: Application, name: str | None, prompt: str, negative_prompt: str) -> list[Any]:
    """Save the style; returns updates for the dialog's list and the styles field."""
    name = (name or "").strip()
    if not name:
        gr.Warning("A style needs a name: type one into the field at the top.")
        return [gr.skip(), gr.skip()]
    try:
        app.styles.save_style(PromptStyle(name, prompt, negative_prompt))
    except (RequestError, OSError) as error:
        gr.Warning(f"The style was not saved: {error}")
        return [gr.skip(), gr.skip()]
    gr.Info(f"Style {name!r} was saved.")
    return _lists(app, name)


def delete_style(app: Application, name: str | None) -> list[Any]:
    """Delete the style; returns updates for the dialog's list, the styles field, and both texts."""
    name = (name or "").strip()
    if name not in app.styles.styles:
        gr.Warning(f"There is no style {name!r}.")
        return [gr.skip()] * 4
    try:
        app.styles.delete_style(name)
    except (RequestError, OSError) as error:
        gr.Warning(f"The style was not deleted: {error}")
        return [gr.skip()] * 4
    return [*_lists(app, None), "", ""]


def _lists(app: Application, chosen: str | None) -> list[Any]:
    names = app.styles.names()
    return [gr.update(choices=names, value=chosen), gr.update(choices=names)]


def connect_style_dialog(app: Application, dialog: StyleDialog, *, prompt: gr.Textbox, negative_prompt: gr.Textbox, styles: gr.Dropdown) -> None:
    """`prompt`, `negative_prompt` and `styles` are the tab's controls."""
    texts, mains, lists = [dialog.prompt, dialog.negative_prompt], [prompt, negative_prompt], [dialog.select, styles]
    dialog.edit.click(lambda: gr.update(choices=app.styles.names()), outputs=[dialog.select], **QUIET)
    dialog.select.change(lambda name: style_texts(app, name), inputs=[dialog.select], outputs=texts, **QUIET)
    dialog.save.click(lambda *values: save_style(app, *values), inputs=[dialog.select, *texts], outputs=lists, **TOLD)
    dialog.delete.click(lambda name: delete_style(app, name), inputs=[dialog.select], outputs=[*lists, *texts], **TOLD)
    dialog.copy.click(fn=None, js="(prompt, negative) => [prompt, negative]", inputs=mains, outputs=texts, show_progress="hidden")
    dialog.apply.click(_applied, inputs=[*mains, *texts], outputs=mains, **QUIET)


def _applied(prompt: str, negative_prompt: str, style_prompt: str, style_negative_prompt: str) -> tuple[str, str]:
    return apply_style(prompt, style_prompt), apply_style(negative_prompt, style_negative_prompt)
