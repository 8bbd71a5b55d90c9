"""The History and Queue tabs. Their content is drawn by the page's scripts, which ask modules/ui/history_routes.py and queue_routes.py; here are the
frames, and the buttons that send a picture to another tab.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from modules.errors import RequestError
from modules.ui.page_files import picture_of_page

if TYPE_CHECKING:
    from modules.application import Application
    from modules.ui.paste import Paster

TOLD: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""For handlers that may show a toast: gradio has a way to send one only through its queue."""
HISTORY_HTML = """
<div class='history' id='history'>
  <div class='history-bar' role='search'>
    <input type='search' id='history_search' placeholder='Search in prompts and parameters' aria-label='Search in prompts and parameters'
           title='Every word must occur; a word may be the beginning of one. "two words" stay together, -word must not occur'>
    <select id='history_folder' aria-label='Folder'><option value=''>All folders</option></select>
    <select id='history_order' aria-label='Order'><option value='newest'>Newest first</option><option value='oldest'>Oldest first</option></select>
    <label><input type='checkbox' id='history_stars'> With a star</label>
    <button type='button' id='history_refresh' title='Look for new pictures'>Refresh</button>
    <button type='button' id='history_compare' title='Show two selected pictures on top of each other (C)' disabled>Compare</button>
    <button type='button' id='history_delete' title='Move the selected pictures into the trash (Delete)' disabled>Delete</button>
    <button type='button' id='history_trash' aria-pressed='false' title='Show deleted pictures'>Trash</button>
    <button type='button' id='history_empty_trash' hidden>Empty trash</button>
    <span class='history-pages'>
      <span id='history_count' role='status'></span>
      <button type='button' id='history_previous' title='Newer page (Page Up)' aria-label='Previous page'>&#8249;</button>
      <input type='number' id='history_page' min='1' value='1' aria-label='Page'>
      <button type='button' id='history_next' title='Older page (Page Down)' aria-label='Next page'>&#8250;</button>
    </span>
  </div>
  <p id='history_said' role='alert' hidden></p>
  <div class='history-body'>
    <div id='history_grid' role='listbox' aria-multiselectable='true' aria-label='Pictures' tabindex='0'></div>
    <div class='history-viewer' id='history_viewer' hidden>
      <img class='history-large' alt='The selected picture'>
      <div class='history-facts'><button type='button' id='history_star' aria-pressed='false' title='Star (S)'>&#9734;</button>
        <span id='history_name'></span><a id='history_link' target='_blank' rel='noopener'>Open</a></div>
      <pre id='history_infotext' tabindex='0' aria-label='Parameters'></pre>
    </div>
  </div>
</div>
"""
QUEUE_HTML = """
<div class='queue' id='queue'>
  <table>
    <thead><tr><th>Job</th><th>From</th><th>Prompt</th><th>State</th><th><span class='only-read-aloud'>Actions</span></th></tr></thead>
    <tbody id='queue_jobs'></tbody>
  </table>
  <p id='queue_nothing'>Nothing waits. Ctrl+Shift+Enter, or the button with the plus sign next to a prompt, puts a job into the queue.</p>
  <p id='queue_said' role='alert' hidden></p>
</div>
"""
SEND_TARGETS = (("txt2img", "Send to txt2img"), ("img2img", "Send to img2img"), ("inpaint", "Send to inpaint"), ("extras", "Send to extras"))


@dataclass(frozen=True, kw_only=True)
class HistoryTab:
    """`number` holds the number of the picture to be sent; `send` the buttons by target."""

    number: gr.Textbox
    send: dict[str, gr.Button]


def create_history_tab() -> HistoryTab:
    """Build the tab inside the current gradio context."""
    gr.HTML(HISTORY_HTML, elem_id="history_frame")
    with gr.Row(elem_id="history_send", elem_classes=["history-send"]):
        send = {name: gr.Button(title, size="sm", elem_id=f"history_send_to_{name}") for name, title in SEND_TARGETS}
    return HistoryTab(number=gr.Textbox(visible="hidden", elem_id="history_number", label="Picture"), send=send)


def create_queue_tab() -> None:
    """Build the tab inside the current gradio context."""
    gr.HTML(QUEUE_HTML, elem_id="queue_frame")


def connect_history(app: Application, tab: HistoryTab, to_txt2img: Paster, to_img2img: Paster, pictures: dict[str, Component]) -> None:
    """Connect the buttons. `pictures`: the controls that take the picture, by target."""
    for name, button in tab.send.items():
        paster = {"txt2img": to_txt2img, "img2img": to_img2img, "inpaint": to_img2img}.get(name)
        outputs = [*([pictures[name]] if name in pictures else []), *(paster.outputs() if paster else [])]
        shown = button.click(
            fn=None, js=f"() => {{ const number = historySelectedNumber(); switch_to_{name}(); return number; }}", outputs=[tab.number],
            show_progress="hidden",
        )  # fmt: skip
        shown.then(_sender(app, paster, takes_picture=name in pictures), inputs=[tab.number], outputs=outputs, **TOLD)


def _sender(app: Application, paster: Paster | None, *, takes_picture: bool) -> Callable[[str], list[Any]]:
    def send(number: str) -> list[Any]:
        """Updates for the picture control, if there is one, and for the controls of the parameters."""
        count = int(takes_picture) + (len(paster.outputs()) if paster else 0)
        try:
            picture, file = app.history.file_of(int(number) if number.isdecimal() and len(number) < 19 else -1)
            path = str(picture_of_page(file, app.config.outputs_dir))
        except RequestError as error:
            gr.Info(str(error))
            return [gr.skip()] * count
        return [*([path] if takes_picture else []), *(paster.updates(picture.infotext, sent=takes_picture) if paster else [])]

    return send
