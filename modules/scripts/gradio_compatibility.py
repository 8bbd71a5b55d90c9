"""Supports gradio 3 and 4 usage in calls from extensions. Our own calls reach gradio unchanged.

`install` adds what gradio dropped (`gr.Dropdown.update`, `.style()`, `gr.Box`) and intercepts calls made by guests
(modules/launch/guest_calls.py knows when): old arguments are translated to current ones, or dropped if nothing corresponds.
`watching_components` notifies a listener of every created control, which gradio itself does not offer.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import gradio.component_meta
import gradio.components
import gradio.events
from gradio.blocks import Block, BlockContext
from gradio.component_meta import ComponentMeta
from gradio.context import Context, get_blocks_context
from gradio.layouts import Form

from modules.launch.guest_calls import as_guest, as_host, guest_is_calling

log = logging.getLogger(__name__)

Listener = Callable[..., Any]

_MARK = "_meets_old_habits"
_NEW_NAMES = {"_js": "js"}
_PROGRESS = {True: "full", False: "hidden"}
_SKIPPED_STYLES = frozenset({"container"})


# Arguments


def _sources(value: Any) -> dict[str, Any]:
    """`source="canvas"` used to be an empty drawing area; today ImageEditor does that, starting from an upload."""
    known = {"upload", "webcam", "clipboard", "microphone"}
    if value is None:
        return {}
    wanted = [value] if isinstance(value, str) else list(value)
    return {"sources": [source for source in wanted if source in known] or ["upload"]}


def _without(values: list[str] | None, name: str, keep: Any) -> list[str] | None:
    return [value for value in values or [] if value != name] if keep is False else values


_CONSTRUCTOR: dict[str, Callable[[Any], dict[str, Any]]] = {
    "source": _sources,
    "show_download_button": lambda value: {} if value else {"buttons": []},
    "show_copy_button": lambda value: {"buttons": ["copy"]} if value else {},
    "preview_open": lambda value: {"preview": value},
    "file_count_max": lambda value: {},
}
"""Old constructor argument -> current ones. Arguments in neither are dropped."""


def current_arguments(cls: type, arguments: dict[str, Any], given: tuple[Any, ...] = ()) -> dict[str, Any]:
    """`arguments` translated to what the constructor of `cls` takes today. `given`: the arguments passed by position."""
    known = _names_taken_by(cls)
    if known is None:
        return arguments
    result: dict[str, Any] = {}
    left_out = []
    for name, value in arguments.items():
        if name in known:
            result[name] = value
        elif name in _CONSTRUCTOR:
            result.update({key: item for key, item in _CONSTRUCTOR[name](value).items() if key in known})
        else:
            left_out.append(name)
    if left_out:
        log.debug("gr.%s no longer takes %s; ignored.", cls.__name__, ", ".join(sorted(left_out)))
    if result.get("visible") is False and issubclass(cls, gradio.components.Component):
        result["visible"] = "hidden"  # it used to be in the DOM, where extensions' scripts look for it
    if issubclass(cls, gr.Textbox) and result.get("value") is None and not given and get_blocks_context() is not None:
        result["value"] = ""  # an empty text used to be "", not None; updates from handlers keep None, or they would clear the control
    if isinstance(result.get("scale"), float):
        result["scale"] = max(round(result["scale"]), 0)
    if issubclass(cls, gr.Dataframe):
        for name, today in (("row_count", "row_count"), ("col_count", "column_count")):
            if name in result:
                count = result.pop(name)  # formerly (3, "fixed"); gradio 6 has no table limits
                result[today] = count[0] if isinstance(count, (tuple, list)) else count
    return result


@functools.cache
def _names_taken_by(cls: Any) -> frozenset[str] | None:
    """Accepted argument names; None if any name is accepted."""
    shown = inspect.signature(cls.__init__).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in shown):
        return None
    own = inspect.getfullargspec(inspect.unwrap(cls.__init__))  # this program's classes expose their parent's signature but accept more
    return frozenset({*(parameter.name for parameter in shown), *own.args, *own.kwonlyargs})


def current_event_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `click` and the like, translated to current ones."""
    result = {_NEW_NAMES.get(name, name): value for name, value in arguments.items()}
    if isinstance(result.get("show_progress"), bool):
        result["show_progress"] = _PROGRESS[result["show_progress"]]
    if result.get("api_name") is False:
        result.pop("api_name")
        result.setdefault("api_visibility", "private")
    for gone in ("status_tracker", "every"):
        result.pop(gone, None)
    if result.get("queue", True) is None:
        result.pop("queue")
    return result


def handler_of_guest(handler: Any) -> Any:
    """Wraps a function that a guest connects to an event, so that components it creates later accept old usage. Other values pass unchanged."""
    if not (inspect.isfunction(handler) or inspect.ismethod(handler)):
        return handler
    wrapped: Callable[..., Any]
    if inspect.isasyncgenfunction(handler):

        async def stream(*args: Any, **kwargs: Any) -> Any:
            values = handler(*args, **kwargs)
            while True:
                with as_guest():
                    try:
                        value = await anext(values)
                    except StopAsyncIteration:
                        return
                yield value

        wrapped = stream
    elif inspect.iscoroutinefunction(handler):

        async def answer_later(*args: Any, **kwargs: Any) -> Any:
            with as_guest():
                return await handler(*args, **kwargs)

        wrapped = answer_later
    elif inspect.isgeneratorfunction(handler):

        def give(*args: Any, **kwargs: Any) -> Any:
            values = handler(*args, **kwargs)
            while True:
                with as_guest():
                    try:
                        value = next(values)
                    except StopIteration:
                        return
                yield value

        wrapped = give
    else:

        def answer(*args: Any, **kwargs: Any) -> Any:
            with as_guest():
                return handler(*args, **kwargs)

        wrapped = answer
    return functools.wraps(handler)(wrapped)


# Additions to gradio

_lock = threading.Lock()
_installed = False


def install() -> None:
    """Support old usage from now on. Calling it again changes nothing."""
    global _installed  # noqa: PLW0603 - gradio is global to the process
    with _lock:
        if _installed:
            return
        _installed = True
    _add_missing_names()
    for cls in _all_classes(Block):
        _support_in_class(cls)
    gr.on = gr.events.on = _translating_event(gr.on)
    _support_in_listeners()
    _support_in_blocks()
    _write_no_stubs_for_guests()


def _all_classes(base: Any) -> list[type]:
    found: list[type] = [base]
    subclasses: list[type] = base.__subclasses__()
    for cls in subclasses:
        found += [name for name in _all_classes(cls) if name not in found]
    return found


def _add_missing_names() -> None:
    missing: dict[Any, dict[str, Any]] = {
        gr: {"Box": gr.Group, "Variable": gr.State},
        gradio.components: {"IOComponent": gradio.components.Component},
        gradio.events: dict.fromkeys(("Changeable", "Clickable", "Releaseable", "Inputable", "Submittable", "Selectable", "Uploadable"), object),
    }
    for module, names in missing.items():
        for name, value in names.items():
            if not hasattr(module, name):
                setattr(module, name, value)
    if not hasattr(Block, "update"):
        Block.update = staticmethod(_update)  # type: ignore[attr-defined]
    if not hasattr(Block, "style"):
        Block.style = _style  # type: ignore[attr-defined]


def _update(value: Any = inspect.Parameter.empty, **properties: Any) -> dict[str, Any]:
    """`gr.Dropdown.update(...)`."""
    if value is not inspect.Parameter.empty:
        properties["value"] = value
    return gr.update(**properties)


def _style(self: Any, **properties: Any) -> Any:
    """`.style(...)`: sets properties that the component has and ignores the rest."""
    cls: Any = type(self)
    known = _names_taken_by(cls) or frozenset()
    renamed = {"full_width": None, "rounded": None, "border": None, "grid": "columns"}
    for name, value in properties.items():
        target = renamed.get(name, name)
        if target is not None and target in known and target not in _SKIPPED_STYLES:
            setattr(self, target, value[0] if target == "columns" and isinstance(value, (list, tuple)) and len(value) == 1 else value)
    return self


def _support_in_class(cls: type) -> None:
    """Make a class of gradio (or of this program) accept old usage when a guest creates or connects an instance."""
    own = vars(cls).get("__init__")
    if own is not None and cls not in (Block, BlockContext, gradio.components.Component, gr.Blocks) and not hasattr(own, _MARK):
        cls.__init__ = _translating_constructor(cls, own)  # type: ignore[misc]
    for name, listener in list(vars(cls).items()):
        if callable(listener) and hasattr(listener, "has_trigger") and not hasattr(listener, _MARK):
            setattr(cls, name, _translating_event(listener))


def _translating_constructor(cls: type, original: Any) -> Any:
    @functools.wraps(original)
    def construct(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not guest_is_calling():
            return original(self, *args, **kwargs)
        with as_host():
            return original(self, *args, **current_arguments(cls, kwargs, args))

    setattr(construct, _MARK, True)
    return construct


def _translating_event(original: Any) -> Any:
    @functools.wraps(original)
    def listen(*args: Any, **kwargs: Any) -> Any:
        if not guest_is_calling():
            return original(*args, **kwargs)
        today = {name: handler_of_guest(value) for name, value in current_event_arguments(kwargs).items()}
        return original(*(handler_of_guest(value) for value in args), **today)

    setattr(listen, _MARK, True)
    return listen


def _support_in_listeners() -> None:
    """`.then` and `.success` are created per event by EventListener."""
    original = gradio.events.EventListener._setup

    @functools.wraps(original)
    def setup(*args: Any, **kwargs: Any) -> Any:
        return _translating_event(original(*args, **kwargs))

    gradio.events.EventListener._setup = staticmethod(setup)  # type: ignore[method-assign]


def _support_in_blocks() -> None:
    """`gr.Blocks(css=..., theme=...)` inside our page: the page sets these."""
    original = gr.Blocks.__init__

    @functools.wraps(original)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        if guest_is_calling():
            for name in ("theme", "css", "css_paths", "js", "head", "head_paths"):
                kwargs.pop(name, None)
            kwargs.setdefault("analytics_enabled", False)
        original(self, *args, **kwargs)

    gr.Blocks.__init__ = construct  # type: ignore[method-assign]


def _write_no_stubs_for_guests() -> None:
    """gradio writes a .pyi file next to the source of every component class; keep it out of extension folders."""
    original = gradio.component_meta.create_or_modify_pyi

    def write_stub(*args: Any, **kwargs: Any) -> None:
        if not guest_is_calling():
            original(*args, **kwargs)

    gradio.component_meta.create_or_modify_pyi = write_stub


# Watching created controls


@contextlib.contextmanager
def outside_of_page() -> Iterator[None]:
    """Inside the block, new components belong to no page even while one is being built. Extensions build their tabs this way."""
    kept = Context.root_block, Context.block
    Context.root_block = Context.block = None
    try:
        yield
    finally:
        Context.root_block, Context.block = kept


@contextlib.contextmanager
def watching_components(before: Listener, after: Listener) -> Iterator[None]:
    """Call `before(component, **kwargs)` and `after(component, **kwargs)` around each control this thread creates in the block.

    `kwargs` are the arguments by name, with the control's final `elem_id`. Forms, which gradio itself puts around controls, are not reported."""
    thread = threading.get_ident()
    original = type.__call__

    def make(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread or get_blocks_context() is None or issubclass(cls, Form):
            return original(cls, *args, **kwargs)
        component = cls.__new__(cls)
        before(component, **kwargs)
        component.__init__(*args, **kwargs)
        after(component, **{**kwargs, "elem_id": getattr(component, "elem_id", None) or kwargs.get("elem_id")})
        return component

    ComponentMeta.__call__ = make  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del ComponentMeta.__call__
