"""The Extras tab: upscales and otherwise postprocesses finished pictures: one, several, or a whole folder.

Must not know the other tabs; modules/ui/tabs.py makes the connections between tabs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from modules.errors import RequestError
from modules.pictures.postprocessing_jobs import BATCH, FOLDER, SINGLE, ExtrasJob, ExtrasProcessed, ExtrasRequest, requests_paths
from modules.pictures.postprocessing_operations import build_runner
from modules.scripts.postprocessing import ScriptPostprocessingRunner
from modules.ui.common import OutputPanel, create_output_panel
from modules.ui.components import ResizeHandleRow
from modules.ui.page_files import picture_of_page
from modules.ui.shown_text import picture_at
from modules.ui.toprow import create_generate_box

if TYPE_CHECKING:
    from modules.application import Application

TAB = "extras"
PICTURE_HEIGHT_PX = 420
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


@dataclass(frozen=True, kw_only=True)
class ExtrasTab:
    """The parts of the tab. `inputs` are the handler's inputs by name, in order (the task id comes before them)."""

    image: gr.Image
    buttons: Mapping[str, gr.Button]
    output: OutputPanel
    task_id: gr.Textbox
    inputs: Mapping[str, Component]
    runner: ScriptPostprocessingRunner


def create_extras_tab(app: Application, runner: ScriptPostprocessingRunner | None = None) -> ExtrasTab:
    """Build the tab inside the current gradio context. `runner` provides the operations; the default is the built-in ones."""
    runner = runner or build_runner()
    shows_folders = not app.config.hide_ui_dir_config
    with ResizeHandleRow(elem_classes=["generation-columns"]):
        with gr.Column(elem_id=f"{TAB}_settings", elem_classes=["settings-column"]):
            sources = _create_sources(shows_folders=shows_folders)
            operations = runner.setup_ui()
        with gr.Column(elem_classes=["results-column"]):
            buttons = create_generate_box(TAB)
            output = create_output_panel(TAB, show_folder_button=shows_folders, gallery_height=app.options.gallery_height)
            gr.HTML(elem_id="html_info_x_extras", visible="hidden")
    task_id = gr.Textbox(visible="hidden", elem_id=f"{TAB}_task_id", label="Task")
    image = sources["image"]
    assert isinstance(image, gr.Image)
    image.clear(runner.image_changed, **QUIET)
    numbered = {f"operation_{number}": control for number, control in enumerate(operations)}
    return ExtrasTab(image=image, buttons=buttons, output=output, task_id=task_id, inputs={**sources, **numbered}, runner=runner)


def _create_sources(*, shows_folders: bool) -> dict[str, Component]:
    """Controls for the source pictures, by the names used on the server."""
    mode = gr.Number(value=SINGLE, precision=0, visible="hidden", elem_id="extras_selected_tab")
    parts: dict[str, Component] = {"mode": mode}
    with gr.Tabs(elem_id="mode_extras"):
        with gr.Tab("Single Image", elem_id="extras_single_tab") as single_tab:
            # the uploaded file itself, so that its metadata survives
            parts["image"] = gr.Image(
                label="Source", elem_id="extras_image", sources=["upload", "clipboard"], type="filepath", image_mode=None, height=PICTURE_HEIGHT_PX
            )
        with gr.Tab("Batch Process", elem_id="extras_batch_process_tab") as batch_tab:
            parts["files"] = gr.File(label="Batch Process", file_count="multiple", file_types=["image"], elem_id="extras_image_batch", height=220)
        with gr.Tab("Batch from Directory", elem_id="extras_batch_directory_tab", visible=shows_folders) as folder_tab:
            parts["input_dir"] = gr.Textbox(label="Input directory", placeholder="A folder on the server", elem_id="extras_batch_input_dir")
            parts["output_dir"] = gr.Textbox(
                label="Output directory", placeholder="Empty: the default Extras folder", elem_id="extras_batch_output_dir"
            )
            parts["show_results"] = gr.Checkbox(label="Show result images", value=True, elem_id="extras_show_extras_results")
    for number, tab in ((SINGLE, single_tab), (BATCH, batch_tab), (FOLDER, folder_tab)):
        tab.select(fn=None, js=f"() => {number}", outputs=[mode], show_progress="hidden")
    return parts


def build_extras(app: Application, runner: ScriptPostprocessingRunner, values: Mapping[str, Any]) -> ExtrasJob:
    """The job for the tab's values. Raises RequestError when no picture is given."""
    mode = int(values["mode"])
    if mode == FOLDER and app.config.hide_ui_dir_config:
        raise RequestError("Server folders cannot be used: the server was started with --hide-ui-dir-config. Upload the pictures instead.")
    args = [value for name, value in values.items() if name.startswith("operation_")]
    output_dir = (values["output_dir"] or "").strip()
    if mode == FOLDER:
        app.folders.check_batch_folder("Input directory", (values["input_dir"] or "").strip())
        app.folders.check_batch_folder("Output directory", output_dir, is_written=True)
    request = ExtrasRequest(
        paths=list(requests_paths(mode, values["image"], values["files"], values["input_dir"] or "")),
        operations=runner.operations(args),
        output_dir=Path(output_dir) if mode == FOLDER and output_dir else None,
        keeps_names=mode != SINGLE,
        shows_results=mode != FOLDER or bool(values["show_results"]),
    )
    return ExtrasJob(app, request)


def carry_out(job: ExtrasJob) -> ExtrasProcessed:
    """Runs on the job's thread."""
    return job.run()


def connect_gallery_to_extras(app: Application, button: gr.Button, extras: ExtrasTab, gallery: gr.Gallery) -> None:
    """Show the Extras tab and put the selected picture of `gallery` into it."""
    index = gr.Number(value=0, visible="hidden", elem_id=f"{button.elem_id}_index")

    def send(pictures: Any, picture_index: float) -> Any:
        file = picture_at(pictures, picture_index)
        if file is None:
            gr.Info("There is no picture to send yet.")
        return gr.skip() if file is None else str(picture_of_page(file, app.config.outputs_dir))

    shown = button.click(
        fn=None, js="() => { const index = selected_gallery_index(); switch_to_extras(); return index; }", outputs=[index], show_progress="hidden"
    )
    shown.then(send, inputs=[gallery, index], outputs=[extras.image], **QUIET)


def connect_picture_to_extras(button: gr.Button, extras: ExtrasTab, picture: Component) -> None:
    """Show the Extras tab and put the picture (a file) of another control into it."""
    shown = button.click(fn=None, js="() => { switch_to_extras(); }", show_progress="hidden")
    shown.then(lambda file: file or gr.skip(), inputs=[picture], outputs=[extras.image], **QUIET)
