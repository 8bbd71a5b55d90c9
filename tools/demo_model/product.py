"""The product itself around the demo checkpoint, in a data folder of its own: for the evaluation and for tools that show what pictures come out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from tools.demo_model.networks import SIDE_PX

if TYPE_CHECKING:
    from modules.application import Application

DEMO_CHECKPOINT = Path(__file__).resolve().parents[2] / "models" / "Stable-diffusion" / "demo-shapes-64.safetensors"


@contextmanager
def installed_product(checkpoint: Path = DEMO_CHECKPOINT) -> Iterator[Application]:
    """The application with this one checkpoint, installed for process_images; whatever was installed before comes back afterwards."""
    from modules import application  # the application's own imports are heavy
    from modules.app_config import AppConfig

    with tempfile.TemporaryDirectory() as data_dir:
        folder = Path(data_dir) / "models" / "Stable-diffusion"
        folder.mkdir(parents=True)
        shutil.copy(checkpoint, folder / checkpoint.name)
        app = application.build_application(AppConfig.for_tests(Path(data_dir)))
        app.options.live_previews_enable = False
        before = application.application_or_none()
        application.install(app)
        try:
            yield app
        finally:
            app.close()
            application.install(before)


def make_text_picture(prompt: str, *, seed: int, **fields: Any) -> Image.Image:
    """One txt2img picture of the installed product: Euler a, 20 steps, CFG 5, the checkpoint's own size, unless `fields` say otherwise."""
    from modules.processing import StableDiffusionProcessingTxt2Img, process_images

    return process_images(StableDiffusionProcessingTxt2Img(**usual_fields(prompt, seed, fields))).images[0]


def make_picture_from(start: Image.Image, prompt: str, *, seed: int, **fields: Any) -> Image.Image:
    """One img2img picture of the installed product that starts from `start`; with a `mask` among the fields, inpainting."""
    from modules.processing import StableDiffusionProcessingImg2Img, process_images

    return process_images(StableDiffusionProcessingImg2Img(init_images=[start], **usual_fields(prompt, seed, fields))).images[0]


def usual_fields(prompt: str, seed: int, fields: dict[str, Any]) -> dict[str, Any]:
    """A request's arguments: what these tools mean where `fields` do not say otherwise."""
    usual = {"steps": 20, "cfg_scale": 5.0, "sampler_name": "Euler a", "width": SIDE_PX, "height": SIDE_PX}
    return {**usual, "do_not_save_samples": True, "do_not_save_grid": True, **fields, "prompt": prompt, "seed": seed}
