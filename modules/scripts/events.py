"""The events of `modules.scripts.callbacks`, each declared once: when it happens, its arguments, and how listeners are called.

`Event(name="image_saved", values=("params",))` creates `on_image_saved(callback)` and `image_saved_callback(params)` there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modules.scripts.hook_signatures import find_signature_faults


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """`sentence` says when it happens; for an event that never fires here, `never` says why.

    `values` are positional; `any_keyword`: keyword arguments may follow. `fills_list`: callbacks append to one shared list argument.
    `joins_lists`: callbacks return a list or None. `newest_first`: last registered, first called. `otherwise` completes the message about a failure.
    """

    name: str
    sentence: str
    values: tuple[str, ...] = ()
    any_keyword: bool = False
    fills_list: bool = False
    joins_lists: bool = False
    newest_first: bool = False
    otherwise: str = "the others continue"
    never: str | None = None
    teller: str = ""
    """The function that calls the listeners, if Forge does not name it NAME_callback."""

    @property
    def called_as(self) -> str:
        """How the host calls a callback, for example `callback(component, **kwargs)`."""
        return f"callback({', '.join((*self.values, *(['**kwargs'] if self.any_keyword else [])))})"

    @property
    def teller_name(self) -> str:
        return self.teller or f"{self.name}_callback"


_PARAMS = ("params",)

IN_ORDER = (
    Event(
        name="app_started",
        sentence="The page and the API are ready; the server is about to start. (demo or None, app)",
        values=("demo", "app"),
    ),
    Event(name="before_reload", sentence="The page is about to be rebuilt. ()", teller="app_reload_callback"),
    Event(
        name="script_unloaded",
        sentence="Scripts are about to be reloaded. ()",
        newest_first=True,
        otherwise="its patches may remain",
    ),
    Event(
        name="before_ui",
        sentence="The page is about to be built. ()",
        newest_first=True,
        otherwise="the page is built without its part",
    ),
    Event(name="model_loaded", sentence="Another model is in use. (sd_model)", values=("sd_model",)),
    Event(name="ui_tabs", sentence="Tabs are collected: a list of (Blocks, title, elem_id). ()", joins_lists=True),
    Event(
        name="ui_train_tabs",
        sentence="Training tabs are collected. (UiTrainTabParams)",
        values=_PARAMS,
        never="there is no Train tab",
    ),
    Event(name="ui_settings", sentence="Settings are collected: shared.opts.add_option. ()"),
    Event(name="before_image_saved", sentence="A picture is about to be written. (ImageSaveParams)", values=_PARAMS),
    Event(name="image_saved", sentence="A picture was written. (ImageSaveParams)", values=_PARAMS),
    Event(name="extra_noise", sentence="img2img has added extra noise. (ExtraNoiseParams)", values=_PARAMS),
    Event(
        name="cfg_denoiser",
        sentence="A step starts; x, sigma and the conditions may be changed. (CFGDenoiserParams)",
        values=_PARAMS,
    ),
    Event(
        name="cfg_denoised",
        sentence="The network answered, guidance is not applied yet; x (prompts, then negative prompts) may be changed. (CFGDenoisedParams)",
        values=_PARAMS,
    ),
    Event(name="cfg_after_cfg", sentence="Guidance has been applied; x may be changed. (AfterCFGCallbackParams)", values=_PARAMS),
    Event(
        name="before_component",
        sentence="A control of the page is about to be created. (component, **kwargs)",
        values=("component",),
        any_keyword=True,
    ),
    Event(
        name="after_component",
        sentence="A control of the page was created. (component, **kwargs)",
        values=("component",),
        any_keyword=True,
    ),
    Event(name="image_grid", sentence="Rows and columns of a grid are chosen. (ImageGridLoopParams)", values=_PARAMS),
    Event(name="infotext_pasted", sentence="Parameters were read for pasting. (infotext, params)", values=("infotext", "params")),
    Event(
        name="list_optimizers",
        sentence="Attention optimizations are collected. (list)",
        values=("res",),
        fills_list=True,
        never="flags choose the attention",
    ),
    Event(
        name="list_unets",
        sentence="Other UNets are collected. (list)",
        values=("unets",),
        fills_list=True,
        never="the checkpoint's own UNet is used",
    ),
    Event(name="before_token_counter", sentence="A prompt's tokens are about to be counted. (BeforeTokenCounterParams)", values=_PARAMS),
)
EVENTS: Mapping[str, Event] = {event.name: event for event in IN_ORDER}


def find_callback_faults(event: Event, callback: Callable[..., Any]) -> Iterator[str]:
    """Yields the reasons why `callback` cannot be called for `event`, worded for its author."""
    name = getattr(callback, "__name__", type(callback).__name__)
    yield from find_signature_faults(callback, name=name, called_as=event.called_as, num_values=len(event.values), any_keyword=event.any_keyword)
