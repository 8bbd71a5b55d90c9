"""An installed application with a narrow random checkpoint, for tests that make pictures. Loading takes a moment: share it within a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modules.application import Application
from modules.jobs.queue import Job
from modules.processing import Processed, StableDiffusionProcessingImg2Img, StableDiffusionProcessingTxt2Img, process_images
from tests.support.applications import installed_application
from tests.support.checkpoints import ReferenceModels, write_checkpoint

SIDE_PX = 64


@contextmanager
def narrow_application(data_dir: Path, *families: str, **checkpoint: Any) -> Iterator[tuple[Application, dict[str, ReferenceModels]]]:
    """The application, and the networks its checkpoints were written from, by family."""
    folder = data_dir / "models" / "Stable-diffusion"
    models = {family: write_checkpoint(folder / f"{family}.safetensors", family, **checkpoint) for family in families or ("sd15",)}
    with installed_application(data_dir) as app:
        app.options.live_previews_enable = False
        yield app, models


def txt2img(**fields: Any) -> StableDiffusionProcessingTxt2Img:
    """A small, fast request."""
    defaults: dict[str, Any] = {
        "prompt": "a red cat",
        "seed": 1,
        "steps": 3,
        "width": SIDE_PX,
        "height": SIDE_PX,
        "sampler_name": "Euler",
        "cfg_scale": 4.0,
    }
    return StableDiffusionProcessingTxt2Img(**{**defaults, **fields})


def img2img(**fields: Any) -> StableDiffusionProcessingImg2Img:
    """A small, fast request; its initial picture contains every color."""
    defaults: dict[str, Any] = {
        "prompt": "a red cat",
        "seed": 1,
        "steps": 4,
        "width": SIDE_PX,
        "height": SIDE_PX,
        "sampler_name": "Euler",
        "cfg_scale": 4.0,
    }
    return StableDiffusionProcessingImg2Img(**{**defaults, "init_images": [gradient(SIDE_PX, SIDE_PX)], **fields})


def gradient(width: int, height: int) -> Image.Image:
    """A smooth, asymmetric picture."""
    y, x = np.mgrid[0:height, 0:width]
    bands = [x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), (x + y) * 127 / max(width + height - 2, 1) + 64]
    return Image.fromarray(np.stack(bands, axis=-1).round().astype(np.uint8))


def run(request: Any) -> Processed:
    """process_images on the test's own thread."""
    return process_images(request)


class KnownPictures:
    """First pictures of requests, each made once: for what other pictures are compared with. Lives as long as one application."""

    def __init__(self) -> None:
        self._made: dict[str, np.ndarray] = {}

    def txt2img(self, **fields: Any) -> np.ndarray:
        return self.picture(txt2img, fields)

    def img2img(self, **fields: Any) -> np.ndarray:
        return self.picture(img2img, fields)

    def picture(self, make: Any, fields: dict[str, Any]) -> np.ndarray:
        key = f"{make.__name__} {sorted(fields.items())}"
        if key not in self._made:
            done = run(make(**fields))
            self._made[key] = pixels(done.images[done.index_of_first_image])
        return self._made[key]


def submit(app: Application, request: Any, task_id: str | None = None) -> Job[Processed]:
    """process_images on the application's worker."""
    return app.jobs.submit(task_id, "txt2img", lambda: process_images(request))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)
