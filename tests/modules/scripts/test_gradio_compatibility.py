from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from modules.launch.guest_calls import as_guest, call_guest, guest_is_calling
from modules.scripts import gradio_compatibility
from modules.scripts.arguments import start_value


@pytest.fixture(autouse=True)
def installed() -> None:
    gradio_compatibility.install()


def test_old_arguments_are_met_for_guests_alone() -> None:
    with gr.Blocks(analytics_enabled=False):
        with pytest.raises(TypeError, match="source"):
            gr.Image(source="upload")
        with as_guest():
            picture = gr.Image(label="A", source="canvas", tool="sketch", brush_radius=4, mirror_webcam=False, show_download_button=False)
            video = gr.Video(source="webcam")
            hidden = gr.Textbox(visible=False)
        shown = gr.Textbox(visible=False)
    assert (picture.sources, picture.buttons, video.sources) == (["upload"], [], ["webcam"])
    assert (hidden.visible, shown.visible) == ("hidden", False)


def test_an_empty_field_of_text_is_an_empty_text_for_guests() -> None:
    with gr.Blocks(analytics_enabled=False), as_guest():
        empty, filled, area = gr.Textbox(label="A"), gr.Textbox("x"), gr.TextArea(None, label="B")
    assert (empty.value, filled.value) == ("", "x")
    assert [start_value(box) for box in (empty, filled, area)] == ["", "x", ""]
    with as_guest():  # outside of a page it is an update
        assert "value" not in gr.Textbox(visible=False)._constructor_args[0]


@pytest.mark.parametrize("kind", ["function", "generator", "coroutine", "stream"])
def test_handlers_of_guests_are_guests_too(kind: str) -> None:
    def function(text: str) -> bool:
        return guest_is_calling()

    def generator(text: str) -> Any:
        yield guest_is_calling()

    async def coroutine(text: str) -> bool:
        return guest_is_calling()

    async def stream(text: str) -> Any:
        yield guest_is_calling()

    handler = {"function": function, "generator": generator, "coroutine": coroutine, "stream": stream}[kind]
    with gr.Blocks(analytics_enabled=False) as page:
        box, answer = gr.Textbox(), gr.JSON()
        with as_guest():
            box.change(handler, inputs=[box], outputs=[answer], api_name="guest")
        box.change(handler, inputs=[box], outputs=[answer], api_name="host")
    connected = {event.api_name: event.fn for event in page.fns.values()}
    assert connected["host"] is handler
    for name, wanted in (("guest", True), ("host", False)):
        assert _all_values(connected[name], "x") == [wanted]
    assert not guest_is_calling()


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """In a thread of its own: where browser tests ran before, this one has an event loop already."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def _all_values(handler: Any, argument: str) -> list[Any]:
    """What gradio would get from a handler of any kind."""
    if inspect.isasyncgenfunction(handler):

        async def collect() -> list[Any]:
            return [value async for value in handler(argument)]

        return _run(collect())
    if inspect.iscoroutinefunction(handler):
        return [_run(handler(argument))]
    return list(handler(argument)) if inspect.isgeneratorfunction(handler) else [handler(argument)]


def test_old_counts_of_tables_are_met() -> None:
    with as_guest():
        table = gr.Dataframe(headers=["word"], row_count=(2, "dynamic"), col_count=(1, "fixed"))
        plain = gr.Dataframe(headers=["word"], row_count=5)
    assert [count[0] for count in (table.row_count, table.col_count, plain.row_count)] == [2, 1, 5]


def test_old_arguments_of_classes_derived_by_guests_are_met() -> None:
    with as_guest():

        class Mine(gr.Button):
            def __init__(self, **kwargs: Any) -> None:
                super().__init__(tooltip="gone", **kwargs)

            def get_block_name(self) -> str:
                return "button"

        with gr.Blocks(analytics_enabled=False, css="a {}", theme="x"):
            button = Mine(value="Go")
    assert button.value == "Go"
    assert not Path(__file__).with_suffix(".pyi").exists()


def test_old_events_are_met_and_ours_are_as_they_are() -> None:
    with gr.Blocks(analytics_enabled=False) as page:
        button, box = gr.Button("a"), gr.Textbox()
        with pytest.raises(TypeError, match="_js"):
            button.click(fn=None, _js="() => 1")
        with as_guest():
            chain = button.click(fn=None, _js="() => 2", inputs=[box], api_name=False)
            chain.then(fn=lambda: None, _js="() => 3", show_progress=False)
            box.change(fn=lambda text: text, inputs=[box], outputs=[box], show_progress=True, queue=None)
            page.load(fn=None, _js="() => 4")
            gr.on([button.click], fn=None, _js="() => 5")
    found = [(fn.js, fn.show_progress) for fn in page.fns.values()]
    assert [js for js, _ in found] == ["() => 2", "() => 3", None, "() => 4", "() => 5"]
    assert found[1][1] == "hidden"
    assert found[2][1] == "full"


def test_what_gradio_no_longer_has_is_there() -> None:
    assert gr.Dropdown.update(choices=["a"], value="a") == gr.update(choices=["a"], value="a")
    assert gr.Textbox.update("x") == gr.update(value="x")
    assert gr.Row.update(visible=False) == gr.update(visible=False)
    assert gr.Box is gr.Group
    assert issubclass(gr.Textbox, gr.components.IOComponent)
    with gr.Blocks(analytics_enabled=False):
        gallery = gr.Gallery().style(grid=[3], height="auto", unknown=1, container=True)
        row = gr.Row().style(equal_height=True)
    assert (gallery.columns, gallery.height, row.equal_height) == (3, "auto", True)


def test_every_control_is_told_of_while_it_is_watched() -> None:
    told: list[tuple[str, str, Any]] = []

    def before(component: Any, **kwargs: Any) -> None:
        told.append(("before", type(component).__name__, kwargs.get("elem_id")))

    def after(component: Any, **kwargs: Any) -> None:
        told.append(("after", type(component).__name__, component.elem_id))

    with gr.Blocks(analytics_enabled=False):
        with gradio_compatibility.watching_components(before, after), gr.Row(elem_id="row"):
            gr.Textbox(elem_id="text")
        gr.Textbox(elem_id="not watched")
    assert told == [("before", "Row", "row"), ("after", "Row", "row"), ("before", "Textbox", "text"), ("after", "Textbox", "text")]


def test_guests_are_known_while_they_are_called() -> None:
    assert call_guest(guest_is_calling, "asking") == (True, True)
    assert not guest_is_calling()


def test_a_failing_guest_is_reported_and_ends_there(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("broken")

    assert call_guest(fail, "an extension failed; the page goes on") == (False, None)
    assert "an extension failed; the page goes on: ValueError: broken" in caplog.text
    with pytest.raises(ValueError, match="broken"):
        call_guest(fail, "x", passing=(ValueError,))
    assert not guest_is_calling()
