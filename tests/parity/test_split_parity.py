"""Jobs on several slots against the same jobs on one: split == whole.

If each row (one image, one branch) runs alone, the pictures equal those of one slot that also runs rows alone, bit for bit: the same kernels
see the same shapes. Usually several rows run together; kernels for other batch sizes sum in a different order, so there the tolerance is
2 of 255.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backend.parallel.placing.fleet import PieceBook, SpeedBook
from backend.parallel.running.session import SamplingSession
from backend.parallel.vae import decoding
from backend.sampling import sampling_function
from modules.application import Application
from tests.support.controlnets import RunsHere
from tests.support.fleets import configured_slots, cpu_fleet, virtual_fleet
from tests.support.narrow_application import img2img, narrow_application, pixels, run, txt2img

SAMPLERS = ["Euler a", "DPM++ 2M", "DPM++ SDE", "Heun", "UniPC", "LCM", "DPM fast", "DPM++ 2M SDE", "Restart", "DDIM CFG++"]


def _mask() -> Image.Image:
    values = np.zeros((64, 64), dtype=np.uint8)
    values[16:48, 16:48] = 255
    return Image.fromarray(values)


JOBS: dict[str, Any] = {
    "txt2img": lambda: txt2img(sampler_name="Euler a", batch_size=2),
    "AND": lambda: txt2img(prompt="a cat AND a red dog :0.7"),
    "without negative": lambda: txt2img(cfg_scale=1.0, batch_size=2),
    "img2img": lambda: img2img(denoising_strength=0.6),
    "inpaint": lambda: img2img(denoising_strength=0.8, mask=_mask(), inpainting_fill=1, batch_size=2),
    "hires": lambda: txt2img(enable_hr=True, hr_scale=2.0, hr_upscaler="Latent", denoising_strength=0.7),
    **{sampler: (lambda sampler=sampler: txt2img(sampler_name=sampler, batch_size=2, steps=4)) for sampler in SAMPLERS},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("split")


@pytest.fixture(scope="module")
def alone(request: pytest.FixtureRequest, folder: Path) -> dict[str, list[np.ndarray]]:
    """Pictures of the jobs that this run compares, from one slot that runs every row alone; hires also with the VAE on one slot."""
    params = [item.callspec.params for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    wanted = {"txt2img", "AND", *(one["job"] for one in params if isinstance(one.get("job"), str) and one["job"] in JOBS)}
    with pytest.MonkeyPatch.context() as patch, configured_slots("cpu"), narrow_application(folder / "one", "sd15") as (app, _):
        patch.setattr(sampling_function, "_pick_batch", lambda model, units, device: [units[-1]])
        patch.setattr(sampling_function, "_call_model", _each_row_alone(sampling_function._call_model))
        return {name: _pictures(app, job) for name, job in JOBS.items() if name in wanted}


class _RowByRow(RunsHere):
    """The network run for one row at a time."""

    def run(self, call: Any) -> torch.Tensor:
        return torch.cat([self.model.run_here(call.take_rows(row, row + 1)) for row in range(call.num_rows)])


def _each_row_alone(call_model: Any) -> Any:
    """The network run for one row at a time."""

    def call(model: Any, *args: Any) -> Any:
        model.runner = _RowByRow(model)
        try:
            return call_model(model, *args)
        finally:
            model.runner = None

    return call


def _pictures(app: Application, job: Any) -> list[np.ndarray]:
    request = job()
    request.do_not_save_grid = True
    done = run(request)
    return [pixels(image) for image in done.images[done.index_of_first_image :]]


FLEETS: dict[str, tuple[str, Any]] = {
    "layers on 2": ("layers", lambda: virtual_fleet(2)),
    "layers on 3": ("layers", lambda: virtual_fleet(3)),
    "layers on 4": ("layers", lambda: virtual_fleet(4)),
    "replicas on 2": ("replicas", lambda: virtual_fleet(2)),
    "replicas on 3": ("replicas", lambda: virtual_fleet(3)),
    "layers on CPU slots": ("layers", lambda: cpu_fleet(2)),
    "replicas on CPU slots": ("replicas", lambda: cpu_fleet(2)),
}


EVERY_JOB_ON = ("layers on 3",)
FEW_JOBS = ("txt2img", "hires")
NIGHTLY = ("layers on 4-hires", *(f"layers on 3-{sampler}" for sampler in ("UniPC", "LCM", "DPM fast", "DPM++ 2M SDE", "DDIM CFG++")))
"""Planning four slots for two sizes is slow. One sampler of each kind runs every time: two calls per step, history, noise, restarts."""
CASES = [
    pytest.param(fleet, job, marks=[pytest.mark.nightly] if f"{fleet}-{job}" in NIGHTLY else [])
    for fleet in FLEETS
    for job in JOBS
    if fleet in EVERY_JOB_ON or job in FEW_JOBS
]
LARGER_UNITS = ("layers on 2", "replicas on 2")


@pytest.fixture(scope="module")
def steady_times() -> Iterator[None]:
    """Fixed measured times, so that the network is re-partitioned in the first job, always at the same places, and planned once."""
    record = PieceBook.record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PieceBook, "record", lambda self, work, piece, busy_ms: record(self, work, piece, 1.0 + piece.segment % 3))
        patch.setattr(SpeedBook, "record", lambda self, slot, work, flops, busy_ms: None)
        yield


@pytest.fixture(scope="module", params=FLEETS)
def split(request: pytest.FixtureRequest, folder: Path, alone: object, steady_times: None) -> Iterator[Application]:
    strategy, make_fleet = FLEETS[request.param]
    fleet: AbstractContextManager[Any] = make_fleet()
    with fleet, narrow_application(folder / request.param.replace(" ", "-"), "sd15") as (app, _):
        app.options.set("multi_gpu_strategy", strategy)
        yield app


@pytest.fixture
def equal_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one row, as in the reference. Pictures are distributed to slots but not split: strips round differently and have their own tests."""
    monkeypatch.setattr(SamplingSession, "_rows_per_batch", lambda self, replica, share: 1)
    monkeypatch.setattr(decoding, "worth_splitting", lambda *args, **kwargs: False)


@pytest.mark.usefixtures("equal_shapes")
@pytest.mark.parametrize(("split", "job"), CASES, indirect=["split"], scope="module")
def test_a_split_job_makes_the_whole_jobs_picture(split: Application, alone: dict[str, list[np.ndarray]], job: str) -> None:
    pictures = _pictures(split, JOBS[job])
    assert len(pictures) == len(alone[job])
    for picture, expected in zip(pictures, alone[job]):
        assert np.array_equal(picture, expected)


@pytest.mark.usefixtures("equal_shapes")
def test_copies_in_the_foreground_give_the_same_picture(split: Application, alone: dict[str, list[np.ndarray]]) -> None:
    def job() -> Any:
        return txt2img(sampler_name="Euler a", batch_size=2, enable_async_gpu=False)

    for picture, expected in zip(_pictures(split, job), alone["txt2img"]):
        assert np.array_equal(picture, expected)


@pytest.mark.parametrize(("split", "job"), [(fleet, job) for fleet in LARGER_UNITS for job in FEW_JOBS], indirect=["split"], scope="module")
def test_units_of_several_rows_differ_by_rounding_alone(split: Application, alone: dict[str, list[np.ndarray]], job: str) -> None:
    for picture, expected in zip(_pictures(split, JOBS[job]), alone[job]):
        assert np.abs(picture - expected).max() <= 2


def test_a_picture_decoded_in_strips_differs_by_rounding_alone(
    split: Application, alone: dict[str, list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "worth_splitting", lambda *args, **kwargs: True)
    for picture, expected in zip(_pictures(split, JOBS["AND"]), alone["AND"]):
        assert np.abs(picture - expected).max() <= 1


@pytest.mark.parametrize("job", ["txt2img", "inpaint", "DPM++ SDE"])
def test_one_slot_with_both_branches_in_a_batch_differs_by_rounding_alone(folder: Path, alone: dict[str, list[np.ndarray]], job: str) -> None:
    with configured_slots("cpu"), narrow_application(folder / f"batched-{job}", "sd15") as (app, _):
        pictures = _pictures(app, JOBS[job])
    for picture, expected in zip(pictures, alone[job]):
        assert np.abs(picture - expected).max() <= 2
