"""`tools.compare_pictures` tells equal pictures from different ones, whichever route made them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from tools.compare_pictures import CHECKPOINTS, compare, list_jobs


class _Server:
    """Answers like the API; `brighter` adds to a pixel of jobs whose request it accepts."""

    def __init__(self, brighter: Any = lambda route, body: 0) -> None:
        self._brighter = brighter

    def get(self, path: str) -> Any:
        assert path == "/sdapi/v1/samplers"
        return [{"name": "Euler"}, {"name": "DDIM"}]

    def post(self, route: str, body: dict[str, Any]) -> Any:
        pixels = np.full((4, 4, 3), 100, np.uint8)
        pixels[1, 2, 0] += self._brighter(route, body)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "png")
        return {"images": [base64.b64encode(stream.getvalue()).decode()]}


def test_every_checkpoint_gets_every_sampler_and_both_kinds_of_given_pictures() -> None:
    jobs = list(list_jobs(["Euler", "DDIM"]))

    assert {(job.checkpoint, job.kind) for job in jobs} == {
        (name, kind) for name in CHECKPOINTS for kind in ("Euler", "DDIM", "img2img", "inpainting")
    }
    assert all(("mask" in job.body) == (job.kind == "inpainting") for job in jobs)


def test_equal_pictures_count_as_equal() -> None:
    rows = list(compare(_Server(), _Server()))  # type: ignore[arg-type]

    assert rows[2:] == [f"| {name} | 4 of 4 | none |" for name in CHECKPOINTS]


def test_one_other_pixel_is_named_with_its_sampler() -> None:
    other = _Server(lambda route, body: 3 if body["sampler_name"] == "DDIM" and "sdxl-v" in str(body["override_settings"]) else 0)

    rows = list(compare(_Server(), other))  # type: ignore[arg-type]

    assert rows[-1] == "| sdxl v | 3 of 4 | DDIM: 3 |"
    assert all(row.endswith("| none |") for row in rows[2:-1])
