"""Custom code: Python from the page runs as the job. Only with --allow-code, because it may do all that this program may."""

from __future__ import annotations

import textwrap
from typing import Any

import gradio as gr
from PIL import Image

from modules import scripts
from modules.application import current_application
from modules.errors import RequestError
from modules.processing import Processed, StableDiffusionProcessing

EXAMPLE = """from modules.processing import process_images

p.width = 768
p.height = 768
p.batch_size = 2
p.steps = 10

return process_images(p)
"""
MAX_INDENT = 16


class Script(scripts.Script):
    """The code is the body of a function with `p`, the request, and `display(images, seed, infotext)`; it may return a Processed."""

    def title(self) -> str:
        return "Custom code"

    def show(self, is_img2img: bool) -> Any:
        return bool(current_application().config.allow_code)

    def ui(self, is_img2img: bool) -> list[Any]:
        code = gr.Code(value=EXAMPLE, language="python", label="Python code", elem_id=self.elem_id("code"))
        indent = gr.Number(label="Indent level", value=2, precision=0, elem_id=self.elem_id("indent_level"))
        return [code, indent]

    def run(self, p: StableDiffusionProcessing, code: str, indent_level: Any) -> Processed:  # type: ignore[override]
        """Raises RequestError where code is not allowed, and for code that Python cannot read."""
        check_allowed(is_api=bool(p.is_api))
        shown: dict[str, Any] = {"images": [], "seed": 0, "info": ""}

        def display(images: Any, seed: Any = 0, infotext: str = "") -> None:
            shown.update(images=[images] if isinstance(images, Image.Image) else list(images), seed=seed, info=infotext)

        returned = run_as_function(str(code or ""), read_indent(indent_level), {"p": p, "display": display})
        if isinstance(returned, Processed):
            return returned
        return Processed(p, shown["images"], shown["seed"], shown["info"])


def check_allowed(*, is_api: bool) -> None:
    """Raises RequestError without --allow-code, and for users of other computers without a password."""
    config = current_application().config
    if not config.allow_code:
        raise RequestError("Custom code runs only when the server was started with --allow-code.")
    if not (config.is_local or (config.api_auth if is_api else config.gradio_auth)):
        flag = "--api-auth" if is_api else "--gradio-auth"
        raise RequestError(
            f"Custom code does not run for everyone who reaches this server: start it with {flag} too, or without --listen and --share."
        )


def read_indent(level: Any) -> int:
    """Raises RequestError."""
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 1 <= level <= MAX_INDENT:
        raise RequestError(f"Custom code: the indent level is {level!r}; send 1 to {MAX_INDENT}.")
    return int(level)


def run_as_function(code: str, indent: int, names: dict[str, Any]) -> Any:
    """What `code`, the body of a function that sees `names`, returns. Raises RequestError if it cannot be read, and what it raises."""
    body = textwrap.indent(code or "pass", " " * indent, lambda line: True)
    space = dict(names)
    try:
        compiled = compile(f"def custom_code():\n{body}\n", "<custom code>", "exec")
    except (SyntaxError, ValueError) as error:
        raise RequestError(f"Custom code: {error}.") from error
    exec(compiled, space)
    return space["custom_code"]()
