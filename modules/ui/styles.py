"""The styles field above the settings: its list of styles, and the button that inserts the chosen styles into the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from modules.ui.style_dialog import connect_style_dialog
from modules.ui.toprow import Toprow

if TYPE_CHECKING:
    from modules.application import Application


def apply_styles(app: Application, prompt: str, negative_prompt: str, names: Sequence[str] | None) -> tuple[str, str, list[str]]:
    """The prompts with the styles inserted, and an empty selection."""
    chosen = list(names or [])
    styles = app.styles
    return styles.apply_styles_to_prompt(prompt, chosen), styles.apply_negative_styles_to_prompt(negative_prompt, chosen), []


def connect_styles(app: Application, toprow: Toprow) -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    fields = [toprow.prompt, toprow.negative_prompt, toprow.styles]
    toprow.apply_styles.click(lambda *values: apply_styles(app, *values), inputs=fields, outputs=fields, **quiet)

    def look_again() -> Any:
        app.styles.reload()
        return gr.update(choices=app.styles.names())

    connect_style_dialog(app, toprow.style_dialog, prompt=toprow.prompt, negative_prompt=toprow.negative_prompt, styles=toprow.styles)
    toprow.styles.focus(look_again, outputs=[toprow.styles], **quiet)
