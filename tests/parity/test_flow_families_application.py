"""The families of transformers through the whole product: jobs with CFG, AND, prompt editing and texts of unlike lengths, on one and two slots.

Reference: one slot; rows in batches differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor

from backend.parallel.running import status
from backend.sampling.registry import SamplerSpec
from modules.application import Application
from modules.jobs.live_preview import approximate_colors
from tests.support.anima_networks import write_anima
from tests.support.applications import installed_application
from tests.support.chroma_networks import write_chroma
from tests.support.dit_checkpoints import DitFiles
from tests.support.fleets import virtual_fleet
from tests.support.flux2_networks import write_flux2
from tests.support.krea2_networks import write_krea2
from tests.support.lumina2_networks import write_lumina2
from tests.support.narrow_application import img2img, pixels, run, txt2img
from tests.support.qwenimage_networks import write_qwenimage
from tests.support.sd3_networks import write_sd3
from tests.support.zimage_networks import write_zimage

SIDE_PX = 64
WRITERS: dict[str, Callable[..., DitFiles]] = {
    "chroma": write_chroma, "sd3": write_sd3, "flux2": write_flux2, "zimage": write_zimage, "lumina2": write_lumina2,
    "qwenimage": write_qwenimage, "krea2": write_krea2, "anima": write_anima,
}  # fmt: skip
BASE: dict[str, Any] = {"cfg_scale": 3.0, "sampler_name": "Euler", "scheduler": "Simple", "do_not_save_grid": True, "negative_prompt": "dark"}
LONG = "a red cat on a green mat in front of a blue house, [a hat:a bag:0.5] " * 3
JOBS: dict[str, Callable[[], Any]] = {
    "txt2img": lambda: txt2img(**BASE, batch_size=2, prompt=LONG),
    "AND": lambda: txt2img(**BASE, prompt=f"a red cat AND {LONG} :0.4"),
    "img2img": lambda: img2img(**BASE, denoising_strength=0.6),
    "inpaint": lambda: img2img(**BASE, denoising_strength=0.8, mask=_mask(), inpainting_fill=1),
    "hires": lambda: txt2img(**BASE, enable_hr=True, hr_scale=1.125, hr_upscaler="Latent", denoising_strength=0.7),
}


def _mask() -> Image.Image:
    values = np.zeros((SIDE_PX, SIDE_PX), dtype=np.uint8)
    values[16:48, 24:] = 255
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, write in WRITERS.items():
        write(folder, "all-in-one", name=name)
    return folder


def _pictures(app: Application, family: str, job: str) -> np.ndarray:
    request = JOBS[job]()
    request.override_settings = {"sd_model_checkpoint": family}
    done = run(request)
    return np.stack([pixels(image) for image in done.images[done.index_of_first_image :]])


@pytest.fixture(scope="module")
def alone(data_dir: Path) -> dict[tuple[str, str], np.ndarray]:
    found = {}
    with virtual_fleet(1), installed_application(data_dir) as app:
        app.options.live_previews_enable = False
        for family in WRITERS:
            found.update({(family, job): _pictures(app, family, job) for job in JOBS})
            assert app.models.engine is not None and app.models.engine.family == family
    return found


@pytest.mark.parametrize("family", WRITERS)
def test_jobs_make_pictures(alone: dict[tuple[str, str], np.ndarray], family: str) -> None:
    assert alone[family, "txt2img"].shape == (2, SIDE_PX, SIDE_PX, 3) and alone[family, "AND"].shape == (1, SIDE_PX, SIDE_PX, 3)
    assert all(alone[family, job].std() > 1 for job in JOBS)
    assert not np.array_equal(alone[family, "txt2img"][0], alone[family, "AND"][0])


def test_klein_s_folded_latents_go_through_every_kind_of_job(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second pass at another size, a mask, a preview; each pass with the noise levels that the authors' pipeline has at its size and number of
    steps."""
    seen: list[Tensor] = []
    compute = SamplerSpec.compute_sigmas

    def record(spec: SamplerSpec, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(compute(spec, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(SamplerSpec, "compute_sigmas", record)
    mask = np.zeros((SIDE_PX, SIDE_PX), dtype=np.uint8)
    mask[16:48, 16:48] = 255
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7, "hr_second_pass_steps": 5}
    inpaint = {"denoising_strength": 0.8, "mask": Image.fromarray(mask), "mask_blur": 0, "inpainting_fill": 1}
    override = {"override_settings": {"sd_model_checkpoint": "flux2"}}
    with virtual_fleet(1), installed_application(data_dir) as app:
        made = run(txt2img(**BASE, **hires, **override))
        assert pixels(made.images[0]).shape == (96, 96, 3) and pixels(made.images[0]).std() > 1
        assert [len(levels) - 1 for levels in seen] == [3, 7], "5 steps of the last 0.7 are 7 in all"
        for levels, tokens in zip(seen, (16, 36), strict=True):
            steps = len(levels) - 1
            library = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
            library.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
            torch.testing.assert_close(levels, library.sigmas, atol=1e-3, rtol=0)
        changed = np.abs(pixels(run(img2img(**BASE, **inpaint, **override)).images[0]) - pixels(img2img().init_images[0])).mean(axis=2)
        assert changed[:15].max() == 0 and changed[20:44, 20:44].mean() > 5
        preview = approximate_colors(app.models.engine, torch.zeros(128, 4, 6))
        assert preview.shape == (3, 8, 12)


def test_sd3_reads_t5_if_the_setting_says_so(data_dir: Path, alone: dict[tuple[str, str], np.ndarray]) -> None:
    with virtual_fleet(1), installed_application(data_dir) as app:
        app.options.live_previews_enable = False
        request = JOBS["txt2img"]()
        request.override_settings = {"sd_model_checkpoint": "sd3", "sd3_enable_t5": True}
        done = run(request)
        assert "SD3 T5: True" in done.infotexts[0]
        read = np.stack([pixels(image) for image in done.images[done.index_of_first_image :]])
        assert np.array_equal(_pictures(app, "sd3", "txt2img"), alone["sd3", "txt2img"]), "the next job does not"
    assert np.abs(read.astype(int) - alone["sd3", "txt2img"]).mean() > 1


@pytest.mark.parametrize("strategy", ["layers", "replicas"])
@pytest.mark.parametrize("family", WRITERS)
def test_two_slots_make_the_same_pictures(data_dir: Path, alone: dict[tuple[str, str], np.ndarray], family: str, strategy: str) -> None:
    with virtual_fleet(2), installed_application(data_dir) as app:
        app.options.live_previews_enable = False
        app.options.set("multi_gpu_strategy", strategy)
        for job in ("txt2img", "AND"):
            assert np.abs(_pictures(app, family, job) - alone[family, job]).max() <= 1, job
            plan = status.current_plan()
            assert plan is not None
            assert plan.strategy == strategy or "so much faster" in plan.reason, "a busy machine may measure one slot much slower"


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.nightly), pytest.param(4, marks=pytest.mark.nightly)])
def test_tiles_make_the_same_pictures(data_dir: Path, alone: dict[tuple[str, str], np.ndarray], count: int) -> None:
    """Every family and job; the enlarged picture has an odd number of latent rows and columns."""
    with virtual_fleet(count), installed_application(data_dir) as app:
        app.options.live_previews_enable = False
        app.options.set("multi_gpu_strategy", "tiles")
        for family, job in alone:
            assert np.abs(_pictures(app, family, job) - alone[family, job]).max() <= 1, f"{family}: {job}"
            plan = status.current_plan()
            assert plan is not None and plan.strategy == "tiles", f"{family}: {job}: {plan}"
