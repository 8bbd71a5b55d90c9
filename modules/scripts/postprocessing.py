"""Operations on finished pictures, run one after another, under the names that extensions import.

An operation is a ScriptPostprocessing. The runner knows all of them, their order, and which page values belong to which. Must not know
particular operations, files or jobs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from modules import errors
from modules.errors import RequestError
from modules.jobs.context import installed_context
from modules.launch.guest_calls import call_guest, end_of_path


@dataclass
class PostprocessedImageSharedInfo:
    """Shared by all pictures made from one picture: the target size of an operation, if known in advance."""

    target_width: int | None = None
    target_height: int | None = None


class PostprocessedImage:
    """A picture passing through the operations. `info` becomes its infotext; `extra_images` (pictures, or more of these) follow it."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.info: dict[str, Any] = {}
        self.shared = PostprocessedImageSharedInfo()
        self.extra_images: list[Any] = []
        self.nametags: list[str] = []
        self.disable_processing = False
        self.caption: str | None = None

    def get_suffix(self, used_suffixes: dict[str, int] | None = None) -> str:
        """The file name suffix from the picture's tags, numbered if `used_suffixes` already contains it."""
        used = {} if used_suffixes is None else used_suffixes
        tags = "".join(f"-{tag}" for tag in self.nametags)
        candidates = itertools.chain([tags], (f"{tags}-{number}" for number in itertools.count(1)))
        suffix = next(text for text in candidates if text not in used)
        used[suffix] = 1
        return suffix

    def create_copy(self, new_image: Image.Image, *, nametags: Sequence[str] | None = None, disable_processing: bool = False) -> PostprocessedImage:
        """A new picture with this one's information and the additional tags `nametags`."""
        copy = PostprocessedImage(new_image)
        copy.shared = self.shared
        copy.nametags = [*self.nametags, *(nametags or ())]
        copy.info = dict(self.info)
        copy.disable_processing = disable_processing
        return copy


class ScriptPostprocessing:
    """One operation. `order` is its position (low first) unless the settings say otherwise; `controls` are those returned by `ui`."""

    filename: str | None = None
    controls: Mapping[str, Any] | None = None
    args_from: int | None = None
    args_to: int | None = None
    order = 1000
    name: str | None = None
    group: Any = None

    def ui(self) -> Mapping[str, Any]:
        """Build the controls inside the current gradio context. Returns them by the names of `process` arguments."""
        return {}

    def process(self, pp: PostprocessedImage, **args: Any) -> None:
        """Change `pp.image` and record that in `pp.info`."""

    def process_firstpass(self, pp: PostprocessedImage, **args: Any) -> None:
        """Called on all operations before the first `process`, so that they can announce sizes and the like."""

    def image_changed(self) -> None:
        """Called when another picture is loaded: drop caches for the previous one."""


Settings = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """An operation with its argument values."""

    script: ScriptPostprocessing
    values: Mapping[str, Any]


class ScriptPostprocessingRunner:
    """All operations. `setting` reads a setting: the order (postprocessing_operation_order) and which operations are hidden."""

    def __init__(self, setting: Settings | None = None) -> None:
        self.scripts: list[ScriptPostprocessing] = []
        self.ui_created = False
        self._setting = setting or _installed_setting

    def register(self, scripts: Iterable[ScriptPostprocessing]) -> None:
        """Add operations; one with a known name replaces it."""
        by_name = {script.name: script for script in (*self.scripts, *scripts)}
        self.scripts = list(by_name.values())

    def initialize_scripts(self, scripts_data: Iterable[Any]) -> None:
        """Add an operation for each class in `scripts_data` (entries with `script_class` and `path`). Failures are reported and skipped."""
        for data in scripts_data:
            task = f"{data.script_class.__name__} of {end_of_path(data.path)} could not be made; the Extras tab is without it"
            well, script = call_guest(data.script_class, task)
            if well:
                script.filename = data.path
                script.name = script.name or data.script_class.__name__
                self.register([script])

    def scripts_in_preferred_order(self) -> list[ScriptPostprocessing]:
        """The visible operations: first those that the settings order, then the others by `order`."""
        preferred = list(self._setting("postprocessing_operation_order") or [])
        hidden = set(self._setting("postprocessing_disable_in_extras") or [])
        shown = [script for script in self.scripts if script.name not in hidden]
        return sorted(
            shown,
            key=lambda script: (
                (0, preferred.index(script.name)) if script.name in preferred else (1, script.order),
                str(script.name).lower(),
            ),
        )

    def setup_ui(self) -> list[Any]:
        """Build the controls of all operations in the current gradio context. Returns the inputs in order.

        An operation whose controls cannot be built is reported and skipped."""
        inputs: list[Any] = []
        for script in self.scripts_in_preferred_order():
            well, controls = _build_controls(script)
            if not well:
                self.scripts.remove(script)
                continue
            script.args_from = len(inputs)
            script.controls = controls
            inputs += script.controls.values()
            script.args_to = len(inputs)
        self.ui_created = True
        return inputs

    def operations(self, args: Sequence[Any]) -> list[Operation]:
        """Operations with their values from `args`, in the order of the controls from setup_ui()."""
        return [
            Operation(script=script, values=dict(zip(script.controls or {}, args[script.args_from : script.args_to])))
            for script in self.scripts_in_preferred_order()
        ]

    def create_args_for_run(self, scripts_args: Mapping[str, Mapping[str, Any]]) -> list[Any]:
        """Arguments for run() from values by operation and control name, with start values for the rest. The page must be built."""
        scripts = self.scripts_in_preferred_order()
        args: list[Any] = [None] * max((script.args_to or 0 for script in scripts), default=0)
        for script in scripts:
            given = scripts_args.get(str(script.name), {})
            controls = script.controls or {}
            args[script.args_from : script.args_to] = [given.get(name, getattr(control, "value", None)) for name, control in controls.items()]
        return args

    def run(self, pp: PostprocessedImage, args: Sequence[Any]) -> None:
        """Run all operations on `pp`; additional pictures end up in `pp.extra_images`."""
        run_operations(pp, self.operations(args))

    def image_changed(self) -> None:
        for script in self.scripts:
            errors.run(script.image_changed, f"forgetting the last picture in {script.name}")


def run_operations(pp: PostprocessedImage, operations: Sequence[Operation], is_stopped: Callable[[], bool] = lambda: False) -> None:
    """Run `operations` on `pp` and on the pictures they add. Raises RequestError for what an operation cannot do."""
    for operation in operations:
        _carry_out(operation, pp, "process_firstpass")
    pictures = [pp]
    for operation in operations:
        if is_stopped():
            break
        for picture in list(pictures):
            if not picture.disable_processing:
                _carry_out(operation, picture, "process")
            pictures += [extra if isinstance(extra, PostprocessedImage) else picture.create_copy(extra) for extra in picture.extra_images]
            picture.extra_images = []
    pp.extra_images = pictures[1:]


def _carry_out(operation: Operation, picture: PostprocessedImage, method: str) -> None:
    """A failing extension operation is reported and leaves the picture unchanged; a RequestError ends the job, as with built-in operations."""
    script = operation.script
    if script.filename is None:
        getattr(script, method)(picture, **operation.values)
        return
    task = f"Operation {script.name!r} ({end_of_path(script.filename)}) failed in {method}; the picture stays as it was"
    call_guest(lambda: getattr(script, method)(picture, **operation.values), task, passing=(RequestError,))


def _build_controls(script: ScriptPostprocessing) -> tuple[bool, Mapping[str, Any]]:
    """(whether it succeeded, the controls). Removes from the page whatever a failing operation had already built."""
    from modules.scripts.controls import build_aside  # imports gradio

    task = f"Operation {script.name!r} ({end_of_path(script.filename)}) could not build its controls; the Extras tab is without it"
    return build_aside(lambda: _controls_of(script), task)


def _controls_of(script: ScriptPostprocessing) -> Mapping[str, Any]:
    controls = script.ui() or {}
    if not isinstance(controls, Mapping):
        raise TypeError(f"ui() returned {type(controls).__name__}; it has to return a dict of names and gradio components")
    return controls


def _installed_setting(name: str) -> Any:
    app = installed_context()
    return None if app is None else getattr(app.options, name)
