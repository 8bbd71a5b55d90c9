"""All script hooks, each declared once with its arguments and one sentence, and the check of a script's hooks against them.

Must not know the page, jobs or how scripts are loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from modules.scripts.hook_signatures import find_signature_faults

_BATCH = ("batch_number", "prompts", "seeds", "subseeds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hook:
    """`values` come after the request `p` and before the script's own arguments; `keywords` are passed by name."""

    name: str
    sentence: str
    values: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()


def _hook(name: str, sentence: str, *, values: tuple[str, ...] = (), keywords: tuple[str, ...] = ()) -> Hook:
    return Hook(name=name, sentence=sentence, values=values, keywords=keywords)


IN_ORDER = (
    _hook("setup", "The request has its scripts and their arguments; not called through the API for scripts with setup_for_ui_only."),
    _hook("run", "The selected script makes the pictures; None lets the job continue as usual."),
    _hook("before_process", "Before settings are overridden and the model is loaded."),
    _hook("process", "Prompts and seeds of all pictures are final."),
    _hook(
        "before_process_init_images",
        "img2img's mask is ready, its pictures are not; pp: crop_region, image_mask.",
        values=("pp",),
    ),
    _hook("before_process_batch", "A batch starts; its prompts still contain the names of networks.", keywords=_BATCH),
    _hook("after_extra_networks_activate", "LoRA and other networks of the batch are applied.", keywords=(*_BATCH, "extra_network_data")),
    _hook("process_batch", "Before the batch's prompts are encoded.", keywords=_BATCH),
    _hook("process_before_every_sampling", "Before each pass: patch p.sd_model.forge_objects here.", keywords=("x", "noise", "c", "uc")),
    _hook("on_mask_blend", "Inpainting restores the original where it is not masked, at each step and at the end.", values=("mba",)),
    _hook("before_hr", "Before the second pass of hires fix."),
    _hook("post_sample", "Latents of the batch before they are decoded.", values=("ps",)),
    _hook("postprocess_batch", "Decoded pictures of the batch, a tensor (B, C, H, W), 0..1.", keywords=("images", "batch_number")),
    _hook("postprocess_batch_list", "The same as a list, which may grow or shrink.", values=("pp",), keywords=("batch_number",)),
    _hook("postprocess_image", "One picture, before it is pasted back.", values=("pp",)),
    _hook("postprocess_maskoverlay", "The overlay for one picture.", values=("ppmo",)),
    _hook("postprocess_image_after_composite", "One picture, pasted back.", values=("pp",)),
    _hook("postprocess", "The job's result.", values=("processed",)),
)
HOOKS: dict[str, Hook] = {hook.name: hook for hook in IN_ORDER}
_ALMOST_A_HOOK = 0.87


def describe_hook(hook: Hook) -> str:
    """The declaration a script needs for it."""
    values = "".join(f", {name}" for name in hook.values)
    return f"{hook.name}(self, p{values}, *args{', **kwargs' if hook.keywords else ''})"


def find_faults(script_class: type, base_class: type) -> Iterator[str]:
    """Mistakes in the hooks defined by `script_class` itself, worded for its author."""
    for name in _own_names(script_class, base_class):
        function = getattr(script_class, name)
        if name in HOOKS:
            yield from _signature_faults(HOOKS[name], function)
        elif callable(function) and not name.startswith("_") and not hasattr(base_class, name):
            yield from _spelling_faults(name)


def _own_names(script_class: type, base_class: type) -> list[str]:
    return sorted({name for cls in script_class.__mro__ if cls not in base_class.__mro__ for name in vars(cls)})


def _spelling_faults(name: str) -> Iterator[str]:
    near = difflib.get_close_matches(name, HOOKS, n=1, cutoff=_ALMOST_A_HOOK)
    if near:
        yield f"{name}() is not a hook and is never called; the nearest is {describe_hook(HOOKS[near[0]])}."


def _signature_faults(hook: Hook, function: Callable[..., Any]) -> Iterator[str]:
    return find_signature_faults(
        function, name=hook.name, called_as=describe_hook(hook), num_values=2 + len(hook.values), keywords=hook.keywords
    )  # self and p come before the values
