"""The product with the demo checkpoint, in its own data folder: for the evaluation and for tools that show pictures."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from tools.demo_model.networks import SIDE_PX

if TYPE_CHECKING:
    from modules.application import Application

MODELS = Path(__file__).resolve().parents[2] / "models"
DEMO_CHECKPOINT = MODELS / "Stable-diffusion" / "demo-shapes-64.safetensors"
DEMO_CONTROLNET = MODELS / "ControlNet" / "demo-shapes-canny.safetensors"
DEMO_LORA = MODELS / "Lora" / "demo-shapes-outline.safetensors"


@contextmanager
def installed_product(checkpoint: Path = DEMO_CHECKPOINT, *, guides: Sequence[Path] = ()) -> Iterator[Application]:
    """The application with this one checkpoint, installed for process_images; the previous application is restored afterwards.

    `guides` are ControlNet and LoRA files, in folders named as in `models`; if given, the built-in extensions are loaded too.
    """
    from modules import application  # the application's own imports are heavy
    from modules.launch.cmd_args import config_for_tests

    with tempfile.TemporaryDirectory() as data_dir:
        for file, kind in ((checkpoint, "Stable-diffusion"), *((guide, guide.parent.name) for guide in guides)):
            folder = Path(data_dir) / "models" / kind
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / file.name)
        app = application.build_application(config_for_tests(Path(data_dir)))
        app.options.live_previews_enable = False
        before = application.application_or_none()
        application.install(app)
        try:
            with _loaded_extensions(app) if guides else nullcontext():
                yield app
        finally:
            app.close()
            application.install(before)


@contextmanager
def _loaded_extensions(app: Application) -> Iterator[None]:
    """The application's extensions with their controls, as the API has them without a page."""
    from modules import scripts
    from modules.scripts.without_page import build_controls  # imports gradio

    scripts.load_scripts(app)
    try:
        build_controls(app)
        yield
    finally:
        scripts.unload_scripts()


def make_text_picture(prompt: str, *, seed: int, **fields: Any) -> Image.Image:
    """One txt2img picture from the installed product: Euler a, 20 steps, CFG 5, the checkpoint's native size, unless `fields` differ.

    `units` in the fields are ControlNet units as in `alwayson_scripts.controlnet.args`; they need `guides`.
    """
    from modules.processing import StableDiffusionProcessingTxt2Img, process_images

    units: Sequence[Mapping[str, Any]] = fields.pop("units", ())
    request = StableDiffusionProcessingTxt2Img(**usual_fields(prompt, seed, fields))
    if units:
        from modules.api.script_args import build_script_args, find_runner
        from modules.application import current_application

        request.scripts = find_runner(current_application(), "txt2img")
        asked = {"controlnet": {"args": list(units)}}
        request.script_args = tuple(build_script_args(request.scripts, script_name=None, script_args=(), alwayson_scripts=asked)[1])
    return process_images(request).images[0]


def make_picture_from(start: Image.Image, prompt: str, *, seed: int, **fields: Any) -> Image.Image:
    """One img2img picture from the installed product, starting from `start`; with a `mask` in the fields, inpainting."""
    from modules.processing import StableDiffusionProcessingImg2Img, process_images

    return process_images(StableDiffusionProcessingImg2Img(init_images=[start], **usual_fields(prompt, seed, fields))).images[0]


def usual_fields(prompt: str, seed: int, fields: dict[str, Any]) -> dict[str, Any]:
    """A request's arguments: `fields` with these tools' defaults."""
    usual = {"steps": 20, "cfg_scale": 5.0, "sampler_name": "Euler a", "width": SIDE_PX, "height": SIDE_PX}
    return {**usual, "do_not_save_samples": True, "do_not_save_grid": True, **fields, "prompt": prompt, "seed": seed}
