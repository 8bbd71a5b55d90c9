"""`Script`, the class that extensions derive from: a feature with controls on the page and hooks into the job.

Must not know the page, jobs, or how scripts are loaded. What each hook is called with is in scripts/hooks.py.
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
"""What `show` returns for a script that is part of the tab, instead of an entry of the Script dropdown."""

_NOT_IN_IDS = re.compile(r"[^a-z_0-9]+")


class Script:
    """One feature. The host makes one object of it for each tab and sets `is_txt2img`, `is_img2img`, `filename` and the slots of its arguments.

    Hooks get the request `p` first and, as `*args`, the values of the controls that `ui` returned.
    """

    name: str | None = None
    section: str | None = None
    """The part of the tab that the controls stand in; None: below everything else."""
    filename: str | None = None
    args_from: int | None = None
    args_to: int | None = None
    alwayson = False
    is_txt2img = False
    is_img2img = False
    tabname: str | None = None
    group: Any = None
    create_group = True
    """Whether the controls get a group of their own, which can be shown and hidden."""
    infotext_fields: Sequence[Any] | None = None
    """(control, key or function of the parameters): what pasting fills in."""
    paste_field_names: Sequence[str] | None = None
    """Keys of the parameters that are not to become overrides of settings."""
    api_info: Any = None
    on_before_component_elem_id: list[tuple[str, Callable[[OnComponent], Any]]] | None = None
    on_after_component_elem_id: list[tuple[str, Callable[[OnComponent], Any]]] | None = None
    setup_for_ui_only = False
    """`setup` is not called for requests of the API."""
    controls: list[Any] | None = None
    sorting_priority = 0
    """Scripts with a higher one stand, and are called, later."""

    def title(self) -> str:
        """The name in the dropdown and in the API."""
        raise NotImplementedError("a script needs a title")

    def ui(self, is_img2img: bool) -> Sequence[Any] | None:
        """Make the controls inside the current gradio context and return them; their values become `*args` of the hooks."""

    def show(self, is_img2img: bool) -> Any:
        """False: not in this tab; True: in the Script dropdown; AlwaysVisible: part of the tab."""
        return True

    def run(self, p: Any, *args: Any) -> Any:
        """The script was selected: make the pictures (a Processed), usually by calling process_images(p); None leaves that to the host."""

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
        """Before any control of the page is made."""

    def after_component(self, component: Any, **kwargs: Any) -> None:
        """After any control of the page was made; what is made here stands behind it."""

    def on_before_component(self, callback: Callable[[OnComponent], Any], *, elem_id: str) -> None:
        """Have `callback` called before the control `elem_id` is made. To be called in `show` or the constructor."""
        if self.on_before_component_elem_id is None:
            self.on_before_component_elem_id = []
        self.on_before_component_elem_id.append((elem_id, callback))

    def on_after_component(self, callback: Callable[[OnComponent], Any], *, elem_id: str) -> None:
        """Have `callback` called after the control `elem_id` was made. To be called in `show` or the constructor."""
        if self.on_after_component_elem_id is None:
            self.on_after_component_elem_id = []
        self.on_after_component_elem_id.append((elem_id, callback))

    def describe(self) -> str:
        """Kept for extensions that define it."""
        return ""

    def elem_id(self, item_id: Any) -> str:
        """A DOM id for a control of this script; with the tab's name where the script is in both tabs."""
        in_both_tabs = self.show(True) == self.show(False)
        tab = ("img2img_" if self.is_img2img else "txt2img_") if in_both_tabs else ""
        title = _NOT_IN_IDS.sub("", self.title().lower().replace(" ", "_"))
        return f"script_{tab}{title}_{item_id}"


class ScriptBuiltinUI(Script):
    """A script whose controls have the ids of the tab itself."""

    setup_for_ui_only = True

    def elem_id(self, item_id: Any) -> str:
        in_both_tabs = self.show(True) == self.show(False)
        tab = ("img2img_" if self.is_img2img else "txt2img_") if in_both_tabs else ""
        return f"{tab}{item_id}"
