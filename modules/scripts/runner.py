"""The scripts of one tab: their controls, the flat list of their arguments, and calling their hooks in order.

Slot 0 of the arguments is the Script dropdown; each script owns slots `args_from` to `args_to`. A failing hook is reported, on the page too,
with the script, the hook and the consequence; the other scripts continue. Must not know tabs, the API or how scripts are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from modules.errors import RequestError
from modules.launch.guest_calls import as_guest, call_guest, end_of_path
from modules.scripts.base import AlwaysVisible, Script
from modules.scripts.files import ScriptClassData
from modules.scripts.hook_arguments import OnComponent
from modules.scripts.hooks import HOOKS, Hook

ComponentCallbacks = dict[str, list[tuple[Callable[[OnComponent], Any], Script]]]

_STEP_HOOKS = ("on_mask_blend",)
"""Hooks within a step that see all pictures of a batch at once."""


class ScriptRunner:
    """One per tab. `list_classes` returns the classes to instantiate, `is_ours` tells whether a file belongs to this program."""

    def __init__(
        self, list_classes: Callable[[], Iterable[ScriptClassData]] = lambda: (), is_ours: Callable[[str], bool] = lambda path: False
    ) -> None:
        self._list_classes = list_classes
        self._is_ours = is_ours
        self.scripts: list[Script] = []
        self.selectable_scripts: list[Script] = []
        self.alwayson_scripts: list[Script] = []
        self.titles: list[str] = []
        self.title_map: dict[str, Script] = {}
        self.infotext_fields: list[Any] = []
        self.paste_field_names: list[str] = []
        self.inputs: list[Any] = [None]
        self.callback_names: list[str] = [f"script_{name}" for name in vars(ScriptRunner) if hasattr(Script, name)]
        self.on_before_component_elem_id: ComponentCallbacks = {}
        self.on_after_component_elem_id: ComponentCallbacks = {}

    # Creating scripts and their controls

    def initialize_scripts(self, is_img2img: bool) -> None:
        """Create new instances of the tab's scripts."""
        for kept in (self.scripts, self.selectable_scripts, self.alwayson_scripts, self.titles):
            kept.clear()
        self.prepare_ui()
        for by_id in (self.title_map, self.on_before_component_elem_id, self.on_after_component_elem_id):
            by_id.clear()
        for data in self._list_classes():
            task = f"{data.script_class.__name__} of {end_of_path(data.path)} could not be created; it is ignored"
            call_guest(partial(self._add, data, is_img2img), task)
        for scripts in (self.scripts, self.selectable_scripts, self.alwayson_scripts):
            scripts.sort(key=lambda script: script.sorting_priority)
        self.title_map.update({str(script.title()).lower(): script for script in reversed(self.scripts)})
        self.titles += [str(script.title()) for script in self.selectable_scripts]

    def _add(self, data: ScriptClassData, is_img2img: bool) -> None:
        script = data.script_class()
        script.filename = data.path
        script.is_txt2img, script.is_img2img = not is_img2img, is_img2img
        script.tabname = "img2img" if is_img2img else "txt2img"
        visibility = script.show(is_img2img)
        str(script.title())
        if not visibility:
            return
        script.alwayson = visibility is AlwaysVisible
        self.scripts.append(script)
        (self.alwayson_scripts if script.alwayson else self.selectable_scripts).append(script)
        for given, by_id in (
            (script.on_before_component_elem_id, self.on_before_component_elem_id),
            (script.on_after_component_elem_id, self.on_after_component_elem_id),
        ):
            for elem_id, callback in given or ():
                by_id.setdefault(elem_id, []).append((callback, script))

    def prepare_ui(self) -> None:
        """Forget the controls of a previously built page."""
        self.inputs = [None]
        self.infotext_fields.clear()
        self.paste_field_names.clear()

    def setup_ui_for_section(self, section: str | None, scriptlist: Sequence[Script] | None = None) -> None:
        """Build the controls for one section of the tab in the current gradio context."""
        from modules.scripts import controls  # imports gradio

        for script in list(self.alwayson_scripts if scriptlist is None else scriptlist):
            if script.alwayson and script.section != section:
                continue
            controls.build_script(self, script)

    def setup_ui(self) -> list[Any]:
        """Build the remaining controls and the Script dropdown; returns all inputs in order."""
        from modules.scripts import controls  # imports gradio

        self.setup_ui_for_section(None)
        controls.build_dropdown(self)
        return self.inputs

    def drop(self, script: Script) -> None:
        """Remove `script` from the tab."""
        for kept in (self.scripts, self.selectable_scripts, self.alwayson_scripts):
            if script in kept:
                kept.remove(script)
        if self.title_map.get(str(script.title()).lower()) is script:
            del self.title_map[str(script.title()).lower()]

    def script(self, title: str) -> Script | None:
        """The script with that title, ignoring case."""
        return self.title_map.get(title.lower())

    def set_named_arg(self, args: list[Any], script_name: str, arg_elem_id: str, value: Any, fuzzy: bool = False) -> None:
        """Put `value` into the slot of the control `arg_elem_id` of the script `script_name`. `fuzzy`: the control's id contains `arg_elem_id`.

        Raises RuntimeError if there is none."""
        script = next((found for found in self.scripts if str(found.name).lower() == script_name.lower()), self.script(script_name))
        if script is None or script.args_from is None:
            raise RuntimeError(f"script {script_name} not found; scripts here: {', '.join(sorted(self.title_map))}")
        for index, control in enumerate(script.controls or ()):
            elem_id = getattr(control, "elem_id", None) or ""
            if arg_elem_id in elem_id if fuzzy else elem_id in (arg_elem_id, script.elem_id(arg_elem_id)):
                args[script.args_from + index] = value
                return
        raise RuntimeError(f"script {script_name} has no control {arg_elem_id}")

    # Calling hooks

    def overrides(self, *hooks: str) -> bool:
        """Whether any script that is part of the tab defines one of `hooks`."""
        return any(_has(script, hook) for script in self.alwayson_scripts for hook in hooks)

    def sees_whole_batches(self) -> bool:
        """Whether a script looks at all pictures of a batch within a step."""
        return self.overrides(*_STEP_HOOKS)

    def _call_all(self, hook: str, p: Any, *values: Any, **keywords: Any) -> None:
        for script in self._in_order(hook):
            self._call(script, hook, p, *values, **keywords)

    def _in_order(self, hook: str) -> list[Script]:
        return [script for script in self.alwayson_scripts if _has(script, hook)]

    def _call(self, script: Script, hook: str, p: Any, *values: Any, **keywords: Any) -> None:
        args = self._args_of(script, p)
        what_next = "the picture is made without it and the other scripts continue"
        task = f"Script {script.title()!r} ({end_of_path(script.filename)}) failed in {hook}; {what_next}"
        refusals = (RequestError,) if self._is_ours(script.filename or "") else ()
        well, _ = call_guest(lambda: getattr(script, hook)(p, *values, *args, **keywords), task, passing=refusals)
        if not well and getattr(p, "comments", None) is not None:
            p.comments[f"{task}. See the server's log for details."] = 1

    def _args_of(self, script: Script, p: Any) -> Sequence[Any]:
        args = getattr(p, "script_args", None) or ()
        return () if script.args_from is None else args[script.args_from : script.args_to]

    def run(self, p: Any, *args: Any) -> Any:
        """Let the script selected in slot 0 make the pictures; None if none is selected or the script leaves that to the host.

        Raises RequestError for an invalid slot value, and whatever the script raises."""
        index = int(args[0] or 0) if args else 0
        if index == 0:
            return None
        if not 0 < index <= len(self.selectable_scripts):
            raise RequestError(f"script {index} does not exist; there are {len(self.selectable_scripts)} scripts: {', '.join(self.titles)}.")
        script = self.selectable_scripts[index - 1]

        with as_guest():
            return script.run(p, *args[script.args_from : script.args_to])

    if TYPE_CHECKING:  # each hook is a method that calls all scripts: see _relay

        def __getattr__(self, name: str) -> Callable[..., None]: ...

    def setup_scrips(self, p: Any, *, is_ui: bool = True) -> None:
        """Call `setup` of all scripts, once the request is complete."""
        for script in self._in_order("setup"):
            if is_ui or not script.setup_for_ui_only:
                self._call(script, "setup", p)

    # The page

    def before_component(self, component: Any, **kwargs: Any) -> None:
        """Called before a control of the tab is created."""
        self._tell_of_component("before_component", self.on_before_component_elem_id, component, kwargs)

    def after_component(self, component: Any, **kwargs: Any) -> None:
        """Called after a control of the tab was created."""
        self._tell_of_component("after_component", self.on_after_component_elem_id, component, kwargs)

    def _tell_of_component(self, hook: str, by_id: ComponentCallbacks, component: Any, kwargs: Any) -> None:
        elem_id = kwargs.get("elem_id")
        for callback, script in by_id.get(elem_id, ()) if elem_id else ():
            task = f"Script {script.title()!r} failed in its on_{hook} for {elem_id}; the page is built without it"
            call_guest(partial(callback, OnComponent(component=component)), task)
        for script in list(self.scripts):
            if _has(script, hook):
                task = f"Script {script.title()!r} ({end_of_path(script.filename)}) failed in {hook}; the page is built without it"
                call_guest(partial(getattr(script, hook), component, **kwargs), task)


def _has(script: Script, hook: str) -> bool:
    """Whether the script defines the hook itself, in its class or on the instance."""
    own = getattr(script, hook, None)
    return own is not None and getattr(own, "__func__", own) is not getattr(Script, hook, None)


def _relay(hook: Hook) -> Callable[..., None]:
    """The runner's method for `hook`. Excess values stand for the first keywords, because guests call `postprocess_batch(p, images)`."""

    def call_all(self: ScriptRunner, p: Any, *values: Any, **keywords: Any) -> None:
        num_values = len(hook.values)
        self._call_all(hook.name, p, *values[:num_values], **dict(zip(hook.keywords, values[num_values:])), **keywords)

    call_all.__name__, call_all.__qualname__, call_all.__doc__ = hook.name, f"ScriptRunner.{hook.name}", hook.sentence
    return call_all


for _hook in HOOKS.values():
    if _hook.name not in ("setup", "run"):
        setattr(ScriptRunner, _hook.name, _relay(_hook))
