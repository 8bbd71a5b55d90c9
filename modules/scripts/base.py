"""`Script`, the base class for extensions: a feature with controls on the page and hooks into the job.

Must not know the page, jobs, or how scripts are loaded. scripts/hooks.py lists the arguments of each hook.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from modules.scripts.hook_arguments import OnComponent

if TYPE_CHECKING:
    from modules.scripts.hook_arguments import (
        MaskBlendArgs,
        PostprocessBatchListArgs,
        PostprocessImageArgs,
        PostProcessMaskOverlayArgs,
        PostSampleArgs,
    )

AlwaysVisible = object()
"""Returned by `show` for a script that is part of the tab instead of an entry in the Script dropdown."""

_NOT_IN_IDS = re.compile(r"[^a-z_0-9]+")


class Script:
    """One feature. The host creates one instance per tab and sets `is_txt2img`, `is_img2img`, `filename` and the argument slots.

    Hooks receive the request `p` first, then as `*args` the values of the controls returned by `ui`.
    """

    name: str | None = None
    section: str | None = None
    """The section of the tab for the controls; None: below everything else."""
    filename: str | None = None
    args_from: int | None = None
    args_to: int | None = None
    alwayson = False
    is_txt2img = False
    is_img2img = False
    tabname: str | None = None
    group: Any = None
    create_group = True
    """Whether the controls get their own group, which can be shown and hidden."""
    infotext_fields: Sequence[Any] | None = None
    """(control, key or function of the parameters): what pasting fills in."""
    paste_field_names: Sequence[str] | None = None
    """Parameter keys that must not become setting overrides."""
    api_info: Any = None
    on_before_component_elem_id: list[tuple[str, Callable[[OnComponent], Any]]] | None = None
    on_after_component_elem_id: list[tuple[str, Callable[[OnComponent], Any]]] | None = None
    setup_for_ui_only = False
    """If true, `setup` is not called for API requests."""
    controls: list[Any] | None = None
    sorting_priority = 0
    """Scripts with a higher value are shown and called later."""

    def title(self) -> str:
        """The name in the dropdown and in the API."""
        raise NotImplementedError("a script needs a title")

    def ui(self, is_img2img: bool) -> Sequence[Any] | None:
        """Create the controls inside the current gradio context and return them; their values become the `*args` of hooks."""

    def show(self, is_img2img: bool) -> Any:
        """False: not in this tab; True: in the Script dropdown; AlwaysVisible: part of the tab."""
        return True

    def run(self, p: Any, *args: Any) -> Any:
        """Called if the script is selected: make the pictures (a Processed), usually via process_images(p). Return None to let the host do it."""

    def setup(self, p: Any, *args: Any) -> None: ...

    def before_process(self, p: Any, *args: Any) -> None: ...

    def process(self, p: Any, *args: Any) -> None: ...

    def before_process_init_images(self, p: Any, pp: Any, *args: Any, **kwargs: Any) -> None: ...

    def before_process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None: ...

    def after_extra_networks_activate(self, p: Any, *args: Any, **kwargs: Any) -> None: ...

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None: ...

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None: ...

    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None: ...

    def postprocess_batch_list(self, p: Any, pp: PostprocessBatchListArgs, *args: Any, **kwargs: Any) -> None: ...

    def on_mask_blend(self, p: Any, mba: MaskBlendArgs, *args: Any) -> None: ...

    def before_hr(self, p: Any, *args: Any) -> None: ...

    def post_sample(self, p: Any, ps: PostSampleArgs, *args: Any) -> None: ...

    def postprocess_image(self, p: Any, pp: PostprocessImageArgs, *args: Any) -> None: ...

    def postprocess_maskoverlay(self, p: Any, ppmo: PostProcessMaskOverlayArgs, *args: Any) -> None: ...

    def postprocess_image_after_composite(self, p: Any, pp: PostprocessImageArgs, *args: Any) -> None: ...

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None: ...

    def before_component(self, component: Any, **kwargs: Any) -> None:
        """Called before any control of the page is created."""

    def after_component(self, component: Any, **kwargs: Any) -> None:
        """Called after any control of the page was created; new controls created here come after it."""

    def on_before_component(self, callback: Callable[[OnComponent], Any], *, elem_id: str) -> None:
        """Call `callback` before the control `elem_id` is created. Use in `show` or the constructor."""
        if self.on_before_component_elem_id is None:
            self.on_before_component_elem_id = []
        self.on_before_component_elem_id.append((elem_id, callback))

    def on_after_component(self, callback: Callable[[OnComponent], Any], *, elem_id: str) -> None:
        """Call `callback` after the control `elem_id` was created. Use in `show` or the constructor."""
        if self.on_after_component_elem_id is None:
            self.on_after_component_elem_id = []
        self.on_after_component_elem_id.append((elem_id, callback))

    def describe(self) -> str:
        """Kept for extensions that define it."""
        return ""

    def elem_id(self, item_id: Any) -> str:
        """A DOM id for a control of this script; includes the tab's name if the script is in both tabs."""
        in_both_tabs = self.show(True) == self.show(False)
        tab = ("img2img_" if self.is_img2img else "txt2img_") if in_both_tabs else ""
        title = _NOT_IN_IDS.sub("", self.title().lower().replace(" ", "_"))
        return f"script_{tab}{title}_{item_id}"


class ScriptBuiltinUI(Script):
    """A script whose control ids look like the tab's own."""

    setup_for_ui_only = True

    def elem_id(self, item_id: Any) -> str:
        in_both_tabs = self.show(True) == self.show(False)
        tab = ("img2img_" if self.is_img2img else "txt2img_") if in_both_tabs else ""
        return f"{tab}{item_id}"
