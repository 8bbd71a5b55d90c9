"""What a denoising step does besides running the network's layers: few Python calls, and nothing that makes the host wait for a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backend.devices import virtual_gpu
from backend.parallel.placing.fleet import Fleet
from backend.sampling.registry import SAMPLERS
from modules.application import Application
from modules.samplers.kdiffusion import KDiffusionSampler
from tests.support.fleets import configured_slots, cpu_fleet, virtual_fleet
from tests.support.narrow_application import img2img, narrow_application, run, txt2img
from tools.step_calls import StepCalls, count_step_calls, programs_of

MOST_CALLS, MOST_CALLS_OF_MANY = 100, 200
"""Per step on one slot, and per step and slot where rows are handed to several. A network call of SD1.5 makes 7,000 inside its layers."""
READS_BACK = ("DPM adaptive",)
"""Samplers that choose the next step by the error of the last."""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """Its networks were loaded on the CPU and stay there: fleets of CPU slots only."""
    with configured_slots("cpu"), narrow_application(tmp_path_factory.mktemp("steps"), "sd15") as (made, _):
        made.options.samples_save = False
        yield made


def _count(app: Application, fleet: Fleet, strategy: str, **fields: Any) -> StepCalls:
    app.options.set("multi_gpu_strategy", strategy)

    def job(num_steps: int) -> None:
        run(txt2img(steps=num_steps, negative_prompt="a dog", width=32, height=32, **fields))

    job(5)
    return count_step_calls(job, programs_of(app.models.engine.forge_objects.unet), fleet)


@pytest.mark.parametrize(("cfg_scale", "prompt"), [(4.0, "a cat"), (1.0, "a cat"), (4.0, "a cat AND a dog :0.5")])
def test_one_slot_makes_few_calls_a_step(app: Application, cfg_scale: float, prompt: str) -> None:
    with configured_slots("cpu") as fleet:
        calls = _count(app, fleet, "auto", cfg_scale=cfg_scale, prompt=prompt)
    assert 0 < calls.total < MOST_CALLS, calls.by_function


def test_two_slots_make_few_calls_each(app: Application) -> None:
    with cpu_fleet(2) as fleet:
        calls = _count(app, fleet, "replicas")
    assert 0 < calls.total < 2 * MOST_CALLS_OF_MANY, (calls.by_thread, calls.by_function)


@contextmanager
def refusing_reads() -> Iterator[None]:
    """Until the end of the block, host reads are refused while a sampler walks down its noise levels."""
    walk = KDiffusionSampler._walk

    def refusing(self: KDiffusionSampler, *args: Any) -> torch.Tensor:
        with virtual_gpu.refusing_host_reads():
            return walk(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KDiffusionSampler, "_walk", refusing)
        yield


SMALL = {"width": 32, "height": 32, "negative_prompt": "a dog"}
JOBS: dict[str, Any] = {
    **{spec.name: partial(txt2img, sampler_name=spec.name) for spec in SAMPLERS if spec.name not in READS_BACK},
    "no guidance": partial(txt2img, cfg_scale=1.0),
    "a schedule of prompts": partial(txt2img, prompt="a [cat:dog:0.5]"),
    "NGMS": partial(txt2img, s_min_uncond=100.0),
    "early steps without guidance": partial(txt2img, override_settings={"skip_early_cond": 0.5}),
    "inpainting": partial(img2img, mask=Image.fromarray(np.tri(32, dtype=np.uint8) * 255), inpainting_fill=1),
}


def test_no_step_reads_from_the_device_or_uploads_a_list(tmp_path: Path) -> None:
    refused = {}
    with virtual_fleet(1), narrow_application(tmp_path, "sd15", is_shallow=True), refusing_reads():
        for name, job in JOBS.items():
            try:
                run(job(**SMALL))
            except virtual_gpu.HostReadError as error:
                refused[name] = str(error)
    assert refused == {}


@pytest.mark.parametrize("strategy", ["replicas", "layers"])
def test_no_step_on_two_slots_reads_from_them(tmp_path: Path, strategy: str) -> None:
    with virtual_fleet(2), narrow_application(tmp_path, "sd15", is_shallow=True) as (app, _):
        app.options.set("multi_gpu_strategy", strategy)
        run(txt2img(**SMALL, batch_size=2, steps=5))  # its measured times may cut the network again, which moves weights
        with refusing_reads():
            run(txt2img(**SMALL, batch_size=2, steps=5))


def test_refused_reads_are_refused() -> None:
    """The check above can fail: every way to read from a device, and to upload a list, raises while reads are refused."""
    with virtual_fleet(1):
        on_device = torch.arange(4.0).to("vgpu:0")
        reads = {
            "item": on_device[0].item,
            "float": lambda: float(on_device[0]),
            "bool": lambda: bool((on_device > 1).all()),
            "cpu": on_device.cpu,
            "to": lambda: on_device.to("cpu"),
            "tolist": on_device.tolist,
            "copy_": lambda: torch.empty(4).copy_(on_device),
            "nonzero": on_device.nonzero,
            "mask": lambda: on_device[on_device > 1],
            "equal": lambda: torch.equal(on_device, on_device),
            "list": lambda: torch.tensor([1.0, 2.0], device="vgpu:0"),
        }
        for name, read in reads.items():
            with virtual_gpu.refusing_host_reads(), pytest.raises(virtual_gpu.HostReadError):
                read()
                pytest.fail(f"{name} was not refused")
            read()
        with virtual_gpu.refusing_host_reads():
            assert (on_device.new_full((2,), 3.0) + on_device[:2]).device.type == "vgpu"
