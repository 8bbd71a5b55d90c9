"""Small extensions for tests, written into an application's folder; loads and unloads them."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modules import scripts
from modules.application import Application
from modules.launch.extension_folders import BUILTIN_DIR


def write_extension(app_or_dir: Application | Path, name: str, files: dict[str, str]) -> Path:
    """An extension `name` with `files` (path inside of it -> text)."""
    folder = (app_or_dir if isinstance(app_or_dir, Path) else app_or_dir.config.extensions_dir) / name
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text), encoding="utf-8")
    return folder


def builtin_module(name: str) -> Any:
    """A module of a built-in extension that is, or was, loaded in this process: other extensions also find it in sys.modules."""
    return sys.modules[name]


def import_builtin(folder: str, name: str) -> Any:
    """A module in a built-in extension's folder, imported as its scripts import it, without loading them."""
    sys.path.insert(0, str(BUILTIN_DIR / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BUILTIN_DIR / folder))


@contextmanager
def loaded_builtin(app: Application, *names: str) -> Iterator[None]:
    """These built-in extensions and those of `app`'s own folder, loaded; forgotten afterwards."""
    app.options.data["disabled_extensions"] = [path.name for path in BUILTIN_DIR.glob("*") if path.name not in names]
    scripts.load_scripts(app)
    try:
        yield
    finally:
        scripts.unload_scripts()
        app.script_runners, app.extensions = {}, []


@contextmanager
def loaded_extensions(app: Application) -> Iterator[None]:
    """The extensions of `app`'s own folder, loaded; forgotten afterwards."""
    with loaded_builtin(app):
        yield


PROMPT_CHANGER = {
    "scripts/changer.py": """
        import gradio as gr

        from modules import scripts
        from modules.processing import process_images
        from modules.ui_components import InputAccordion


        class Changer(scripts.Script):
            def title(self):
                return "Prompt Changer"

            def show(self, is_img2img):
                return scripts.AlwaysVisible

            def ui(self, is_img2img):
                with InputAccordion(False, label=self.title(), elem_id=self.elem_id("enabled")) as enabled:
                    words = gr.Textbox(label="Words", value="in the rain", elem_id=self.elem_id("words"))
                    side = gr.Radio(label="Side", choices=["front", "back"], value="back", type="index")
                self.infotext_fields = [(words, "Changed by")]
                self.paste_field_names = ["Changed by"]
                return [enabled, words, side]

            def process(self, p, enabled, words, side):
                if enabled:
                    p.all_prompts = [f"{words}, {prompt}" if side == 0 else f"{prompt}, {words}" for prompt in p.all_prompts]
                    p.extra_generation_params["Changed by"] = words
    """
}
SELECTABLE = {
    "scripts/twice.py": """
        import gradio as gr

        from modules import processing, scripts


        class Twice(scripts.Script):
            def title(self):
                return "Make it twice"

            def ui(self, is_img2img):
                return [gr.Slider(minimum=1, maximum=9, step=1, label="Seed step", value=1, elem_id=self.elem_id("step"))]

            def run(self, p, seed_step):
                processing.fix_seed(p)
                first = processing.process_images(p)
                p.seed = int(p.seed) + int(seed_step)
                second = processing.process_images(p)
                images = first.images + second.images
                return processing.Processed(p, images, first.seed, first.info, infotexts=first.infotexts + second.infotexts)
    """
}
ALL_HOOKS = (
    *("setup", "before_process", "process", "before_process_init_images", "before_process_batch", "after_extra_networks_activate"),
    *("process_batch", "process_before_every_sampling", "on_mask_blend", "before_hr", "post_sample", "postprocess_batch"),
    *("postprocess_batch_list", "postprocess_image", "postprocess_maskoverlay", "postprocess_image_after_composite", "postprocess"),
)
TABS_AND_ROUTES = {
    "scripts/tab.py": """
        import gradio as gr

        from modules import script_callbacks, shared

        seen = []


        def make_tab():
            with gr.Blocks(analytics_enabled=False) as block:
                name = gr.Textbox(label="Name", elem_id="hello_name")
                hidden = gr.Textbox(visible=False, elem_id="hello_hidden")
                picture = gr.Image(label="Picture", source="upload", tool="editor", type="pil", elem_id="hello_picture").style(height=480)
                with gr.Box():
                    choice = gr.Dropdown(choices=["a", "b"], label="Choice", elem_id="hello_choice")
                button = gr.Button("Go").style(full_width=False)
                button.click(fn=lambda text: gr.Dropdown.update(choices=[text]), _js="(x) => [x]", inputs=[name], outputs=[choice]).then(
                    fn=None, _js="() => {}", show_progress=False
                )
            return [(block, "Hello", "hello_tab")]


        def add_route(demo, app):
            seen.append(demo)

            @app.get("/hello/answer")
            def answer():
                return {"answer": shared.opts.hello_answer}


        def add_settings():
            shared.opts.add_option("hello_answer", shared.OptionInfo(42, "Answer", gr.Number, section=("hello", "Hello")))


        script_callbacks.on_ui_tabs(make_tab)
        script_callbacks.on_app_started(add_route)
        script_callbacks.on_ui_settings(add_settings)
    """
}


def failing_in(hook: str, raises: str = "ValueError('it broke')") -> dict[str, str]:
    """A script that is part of the tab and raises in one hook."""
    return {
        "scripts/failing.py": f"""
            from modules import scripts
            from modules.errors import RequestError


            class Failing(scripts.Script):
                def title(self):
                    return "Failing"

                def show(self, is_img2img):
                    return scripts.AlwaysVisible

                def {hook}(self, *args, **kwargs):
                    raise {raises}
        """
    }


def recording_hooks() -> dict[str, str]:
    """A script that records every hook call, in order, in `calls` of its module."""
    methods = "\n".join(
        f"    def {hook}(self, p, *args, **kwargs):\n        calls.append(({hook!r}, args, dict(kwargs)))\n" for hook in (*ALL_HOOKS,)
    )
    head = "from modules import scripts\n\ncalls = []\n\n\nclass Recorder(scripts.Script):\n"
    title = "    def title(self):\n        return 'Recorder'\n\n    def show(self, is_img2img):\n        return scripts.AlwaysVisible\n\n"
    return {"scripts/recorder.py": head + title + methods}
