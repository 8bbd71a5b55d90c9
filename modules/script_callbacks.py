"""Events outside of a job's hooks that extensions listen to: `on_X(callback)` registers, `X_callback(...)` tells everyone.

A callback that fails is reported by its file and the event; the others are told all the same. Must not know who listens.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from modules.extension_order import OrderRule, order_by_rules
from modules.guest_calls import call_guest, end_of_path
from modules.hook_arguments import (
    AfterCFGCallbackParams,
    BeforeTokenCounterParams,
    CFGDenoisedParams,
    CFGDenoiserParams,
    ExtraNoiseParams,
    ImageGridLoopParams,
    ImageSaveParams,
    UiTrainTabParams,
)

__all__ = [
    "AfterCFGCallbackParams",
    "BeforeTokenCounterParams",
    "CFGDenoisedParams",
    "CFGDenoiserParams",
    "ExtraNoiseParams",
    "ImageGridLoopParams",
    "ImageSaveParams",
    "UiTrainTabParams",
]

log = logging.getLogger(__name__)

Callback = Callable[..., Any]


class ScriptCallback(NamedTuple):
    """Who listens: the file it was registered in, what is called, and its name among all callbacks."""

    script: str
    callback: Callback
    name: str = "unnamed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """`sentence` says when it happens; `never` says, for events that do not happen here, why."""

    sentence: str
    never: str | None = None


EVENTS: Mapping[str, Event] = {
    "app_started": Event(sentence="The page and the API are ready; the server is about to answer. (demo or None, app)"),
    "before_reload": Event(sentence="The page is about to be built anew. ()"),
    "script_unloaded": Event(sentence="Scripts are about to be loaded again. ()"),
    "before_ui": Event(sentence="The page is about to be built. ()"),
    "model_loaded": Event(sentence="Another model is in use. (sd_model)"),
    "ui_tabs": Event(sentence="Tabs are collected: a list of (Blocks, title, elem_id). ()"),
    "ui_train_tabs": Event(sentence="Tabs of training are collected. (UiTrainTabParams)", never="there is no Train tab"),
    "ui_settings": Event(sentence="Settings are collected: shared.opts.add_option. ()"),
    "before_image_saved": Event(sentence="A picture is about to be written. (ImageSaveParams)"),
    "image_saved": Event(sentence="A picture was written. (ImageSaveParams)"),
    "extra_noise": Event(sentence="img2img added extra noise. (ExtraNoiseParams)"),
    "cfg_denoiser": Event(sentence="A step begins; x, sigma and the conditions may be changed. (CFGDenoiserParams)"),
    "cfg_denoised": Event(
        sentence="The network answered, guidance is not applied yet. (CFGDenoisedParams)",
        never="the engine applies guidance in the same step; on_cfg_after_cfg comes right after it",
    ),
    "cfg_after_cfg": Event(sentence="Guidance is applied; x may be changed. (AfterCFGCallbackParams)"),
    "before_component": Event(sentence="A control of the page is about to be made. (component, **kwargs)"),
    "after_component": Event(sentence="A control of the page was made. (component, **kwargs)"),
    "image_grid": Event(sentence="Rows and columns of a grid are chosen. (ImageGridLoopParams)"),
    "infotext_pasted": Event(sentence="Parameters were read for pasting. (infotext, params)"),
    "list_optimizers": Event(sentence="Kinds of attention are collected. (list)", never="attention is chosen by flags"),
    "list_unets": Event(sentence="Other UNets are collected. (list)", never="the checkpoint's own UNet is used"),
    "before_token_counter": Event(sentence="A prompt is about to be counted. (BeforeTokenCounterParams)"),
}


callback_map: dict[str, list[ScriptCallback]] = {f"callbacks_{name}": [] for name in EVENTS}
"""All callbacks by event, in the order they were registered."""
order_rules: list[OrderRule] = []
"""What `[callbacks/NAME]` of metadata.ini asks for; filled when extensions are listed."""


# Registering


def add_callback(
    callbacks: list[ScriptCallback], callback: Callback, *, name: str | None = None, category: str = "unknown", filename: str = ""
) -> None:
    """Put `callback` on a list under a name of its own: extension/file/event[/name]."""
    filename = filename or _caller_file()
    parts = (*_extension_and_file(filename), category, *([name] if name else []))
    wanted, number = "/".join(parts), 0
    taken = {entry.name for entry in callbacks}
    while (unique := f"{wanted}-{number}" if number else wanted) in taken:
        number += 1
    callbacks.append(ScriptCallback(filename, callback, unique))


def _caller_file() -> str:
    """The file outside of this one that is calling."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame.f_code.co_filename


def _extension_and_file(filename: str) -> tuple[str, str]:
    path = Path(filename)
    folder = path.parent.parent if path.parent.name == "scripts" else path.parent
    return folder.name.lower(), path.name


def _register(event: str, callback: Callback, name: str | None) -> None:
    filename = _caller_file()
    if EVENTS[event].never:
        log.warning("%s listens to on_%s, which never happens here: %s.", end_of_path(filename), event, EVENTS[event].never)
    add_callback(callback_map[f"callbacks_{event}"], callback, name=name, category=event, filename=filename)


def on_app_started(callback: Callback, *, name: str | None = None) -> None:
    """`callback(demo, app)`, demo None without a page; `app` is the FastAPI application, to which routes may be added."""
    _register("app_started", callback, name)


def on_before_reload(callback: Callback, *, name: str | None = None) -> None:
    """`callback()` before the page is built anew."""
    _register("before_reload", callback, name)


def on_script_unloaded(callback: Callback, *, name: str | None = None) -> None:
    """`callback()` before scripts are loaded again: undo what was patched."""
    _register("script_unloaded", callback, name)


def on_before_ui(callback: Callback, *, name: str | None = None) -> None:
    """`callback()` before the page is built."""
    _register("before_ui", callback, name)


def on_model_loaded(callback: Callback, *, name: str | None = None) -> None:
    """`callback(sd_model)` when another model is in use."""
    _register("model_loaded", callback, name)


def on_ui_tabs(callback: Callback, *, name: str | None = None) -> None:
    """`callback()` returns tabs: a list of (gr.Blocks, title, elem_id), or None."""
    _register("ui_tabs", callback, name)


def on_ui_train_tabs(callback: Callback, *, name: str | None = None) -> None:
    """Kept for extensions that register it."""
    _register("ui_train_tabs", callback, name)


def on_ui_settings(callback: Callback, *, name: str | None = None) -> None:
    """`callback()` adds settings with `shared.opts.add_option`."""
    _register("ui_settings", callback, name)


def on_before_image_saved(callback: Callback, *, name: str | None = None) -> None:
    """`callback(params)` may change the picture, its name and its infotext (ImageSaveParams)."""
    _register("before_image_saved", callback, name)


def on_image_saved(callback: Callback, *, name: str | None = None) -> None:
    """`callback(params)` after a picture was written (ImageSaveParams)."""
    _register("image_saved", callback, name)


def on_extra_noise(callback: Callback, *, name: str | None = None) -> None:
    """`callback(params)` when img2img adds extra noise (ExtraNoiseParams)."""
    _register("extra_noise", callback, name)


def on_cfg_denoiser(callback: Callback, *, name: str | None = None) -> None:
    """`callback(params)` at the start of each step (CFGDenoiserParams). Pictures of a batch then go step by step together."""
    _register("cfg_denoiser", callback, name)


def on_cfg_denoised(callback: Callback, *, name: str | None = None) -> None:
    """`callback(params)` when the network answered (CFGDenoisedParams)."""
    _register("cfg_denoised", callback, name)


def on_cfg_after_cfg(callback: Callback, *, name: str | None = None) -> None:
    """`callback(params)` when guidance is applied (AfterCFGCallbackParams)."""
    _register("cfg_after_cfg", callback, name)


def on_before_component(callback: Callback, *, name: str | None = None) -> None:
    """`callback(component, **kwargs)` before each control of the page."""
    _register("before_component", callback, name)


def on_after_component(callback: Callback, *, name: str | None = None) -> None:
    """`callback(component, **kwargs)` after each control of the page: the place to put something behind it."""
    _register("after_component", callback, name)


def on_image_grid(callback: Callback, *, name: str | None = None) -> None:
    """`callback(params)` may change rows and columns of a grid (ImageGridLoopParams)."""
    _register("image_grid", callback, name)


def on_infotext_pasted(callback: Callback, *, name: str | None = None) -> None:
    """`callback(infotext, params)` may change the parameters read from an infotext."""
    _register("infotext_pasted", callback, name)


def on_list_optimizers(callback: Callback, *, name: str | None = None) -> None:
    """Kept for extensions that register it."""
    _register("list_optimizers", callback, name)


def on_list_unets(callback: Callback, *, name: str | None = None) -> None:
    """Kept for extensions that register it."""
    _register("list_unets", callback, name)


def on_before_token_counter(callback: Callback, *, name: str | None = None) -> None:
    """`callback(params)` may change the prompt that is counted (BeforeTokenCounterParams)."""
    _register("before_token_counter", callback, name)


# Removing


def clear_callbacks() -> None:
    """Forget every callback."""
    for callbacks in callback_map.values():
        callbacks.clear()


def remove_current_script_callbacks() -> None:
    """Forget the callbacks that the calling file registered."""
    filename = _caller_file()
    for callbacks in callback_map.values():
        callbacks[:] = [entry for entry in callbacks if entry.script != filename]


def remove_callbacks_for_function(callback_func: Callback) -> None:
    """Forget `callback_func`, whichever event it listens to."""
    for callbacks in callback_map.values():
        callbacks[:] = [entry for entry in callbacks if entry.callback != callback_func]


# Telling


def ordered_callbacks(category: str) -> list[ScriptCallback]:
    """The callbacks of an event as they are told: as registered, unless a metadata.ini asks for another order."""
    callbacks = list(callback_map[f"callbacks_{category}"])
    if len(callbacks) < 2 or not order_rules:
        return callbacks
    by_name = {entry.name: entry for entry in callbacks}
    return [by_name[name] for name in order_by_rules(list(by_name), order_rules)]


def is_listened_to(*events: str) -> bool:
    """Whether anyone listens to one of `events`."""
    return any(callback_map[f"callbacks_{event}"] for event in events)


def _tell(event: str, *args: Any, **kwargs: Any) -> list[Any]:
    """What every callback returned; failures are reported and left out."""
    results = []
    for entry in ordered_callbacks(event):
        task = f"{end_of_path(entry.script)} failed in on_{event}; the others go on"
        well, result = call_guest(partial(entry.callback, *args, **kwargs), task)
        if well:
            results.append(result)
    return results


def app_started_callback(demo: Any, app: Any) -> None:
    _tell("app_started", demo, app)


def app_reload_callback() -> None:
    _tell("before_reload")


def script_unloaded_callback() -> None:
    for entry in reversed(ordered_callbacks("script_unloaded")):
        call_guest(entry.callback, f"{end_of_path(entry.script)} failed in on_script_unloaded; what it patched may still be so")


def before_ui_callback() -> None:
    for entry in reversed(ordered_callbacks("before_ui")):
        call_guest(entry.callback, f"{end_of_path(entry.script)} failed in on_before_ui; the page is built without what it prepares")


def model_loaded_callback(sd_model: Any) -> None:
    _tell("model_loaded", sd_model)


def ui_tabs_callback() -> list[tuple[Any, str, str]]:
    """All tabs of extensions: (Blocks, title, elem_id)."""
    return [tab for tabs in _tell("ui_tabs") for tab in tabs or []]


def ui_train_tabs_callback(params: UiTrainTabParams) -> None:
    _tell("ui_train_tabs", params)


def ui_settings_callback() -> None:
    _tell("ui_settings")


def before_image_saved_callback(params: ImageSaveParams) -> None:
    _tell("before_image_saved", params)


def image_saved_callback(params: ImageSaveParams) -> None:
    _tell("image_saved", params)


def extra_noise_callback(params: ExtraNoiseParams) -> None:
    _tell("extra_noise", params)


def cfg_denoiser_callback(params: CFGDenoiserParams) -> None:
    _tell("cfg_denoiser", params)


def cfg_denoised_callback(params: CFGDenoisedParams) -> None:
    _tell("cfg_denoised", params)


def cfg_after_cfg_callback(params: AfterCFGCallbackParams) -> None:
    _tell("cfg_after_cfg", params)


def before_component_callback(component: Any, **kwargs: Any) -> None:
    _tell("before_component", component, **kwargs)


def after_component_callback(component: Any, **kwargs: Any) -> None:
    _tell("after_component", component, **kwargs)


def image_grid_callback(params: ImageGridLoopParams) -> None:
    _tell("image_grid", params)


def infotext_pasted_callback(infotext: str, params: dict[str, Any]) -> None:
    _tell("infotext_pasted", infotext, params)


def list_optimizers_callback() -> list[Any]:
    res: list[Any] = []
    _tell("list_optimizers", res)
    return res


def list_unets_callback() -> list[Any]:
    res: list[Any] = []
    _tell("list_unets", res)
    return res


def before_token_counter_callback(params: BeforeTokenCounterParams) -> None:
    _tell("before_token_counter", params)
