"""The families of transformers through the whole product: jobs with CFG, AND, prompt editing and texts of unlike lengths, on one and two slots.

Reference: one slot; rows in batches differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from backend.parallel.running import status
from modules.application import Application
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
    "qwenimage": write_qwenimage, "krea2": write_krea2,
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
            assert plan is not None and plan.strategy == strategy


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
