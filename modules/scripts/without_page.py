"""Builds the controls of scripts when there is no page, so that the API knows each script's arguments and their defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr

from modules.scripts import gradio_compatibility

if TYPE_CHECKING:
    from modules.application import Application


def build_controls(app: Application) -> None:
    """Build the controls of the scripts of every tab in a page that nobody sees."""
    gradio_compatibility.install()
    for runner in app.script_runners.values():
        with gr.Blocks(analytics_enabled=False):
            runner.prepare_ui()
            for section in {script.section for script in runner.alwayson_scripts if script.section is not None}:
                runner.setup_ui_for_section(section)
            runner.setup_ui()
