from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tools.campaign.cluster import compare, make_job, measure_overhead, pixels, wait_for_workers


def answer_of(*colors: int) -> dict[str, Any]:
    texts = []
    for color in colors:
        content = io.BytesIO()
        Image.new("RGB", (4, 4), (color, 0, 0)).save(content, "PNG")
        texts.append(base64.b64encode(content.getvalue()).decode())
    return {"images": texts}


class Server:
    """Answers every request the same, or raises."""

    def __init__(self, answer: Any, busy_s: float = 0.0) -> None:
        self.answer, self.busy_s = answer, busy_s

    def txt2img(self, **body: Any) -> Any:
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer

    def get(self, path: str) -> Any:
        return {"cluster": {"workers": [{"state": "idle", "busy_s": self.busy_s}]}}


@pytest.mark.parametrize(
    ("answer", "body", "found"),
    [
        (answer_of(10, 20), {}, "same"),
        (answer_of(10, 21), {}, "different"),
        (answer_of(10, 21), {"batch_size": 2}, "same"),
        (answer_of(10, 22), {"batch_size": 2}, "different"),
        (answer_of(10), {}, "another number of pictures"),
        (OSError("gone"), {}, "lost (gone)"),
    ],
)
def test_a_lost_doubled_or_changed_picture_is_found(answer: Any, body: dict[str, Any], found: str) -> None:
    expected = pixels(answer_of(10, 20))
    server: Any = Server(answer)
    assert compare(server, body, expected) == [found]


def test_the_mix_has_every_kind_of_job_and_is_the_same_in_every_run() -> None:
    jobs = [make_job(number) for number in range(200)]
    assert jobs == [make_job(number) for number in range(200)]
    assert {job["sampler_name"] for job in jobs} == {"Euler", "Euler a", "DPM++ 2M", "DDIM"}
    assert {(job.get("n_iter", 1), job.get("batch_size", 1)) for job in jobs} == {(1, 1), (2, 1), (3, 1), (1, 2)}
    assert len({job["seed"] for job in jobs}) == 200


def test_the_overhead_is_what_the_workers_did_not_take() -> None:
    server: Any = Server(answer_of(1))
    assert "median" in measure_overhead(server)
    wait_for_workers(server, 1)
    assert np.array_equal(pixels(answer_of(7))[0][0, 0], [7, 0, 0])
