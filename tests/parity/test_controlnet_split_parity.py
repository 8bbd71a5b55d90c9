"""Jobs with two ControlNets on several slots against the same jobs on one: split == whole.

Each row (one picture, one branch) runs alone on every plan, and so do its ControlNets, wherever they are: the pictures are the same bit
for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend.controlnet_loader import load_controlnet
from backend.parallel.running.session import SamplingSession
from backend.parallel.vae import decoding
from backend.patcher.controlnet import apply_controlnet_advanced
from backend.sampling import sampling_function
from modules.application import Application
from tests.parity.test_split_parity import _each_row_alone
from tests.support.checkpoints import ReferenceModels
from tests.support.controlnets import build_controlnet, hint, with_deferred_controlnets, write_controlnet
from tests.support.fleets import configured_slots, cpu_fleet, virtual_fleet
from tests.support.narrow_application import narrow_application, pixels, run, txt2img

FAMILIES = ("sd15", "sdxl")
FLEETS: dict[str, tuple[str, Any]] = {
    "layers on 2": ("layers", lambda: virtual_fleet(2)),
    "layers on 3": ("layers", lambda: virtual_fleet(3)),
    "replicas on 2": ("replicas", lambda: virtual_fleet(2)),
    "replicas on 3": ("replicas", lambda: virtual_fleet(3)),
    "one virtual GPU": ("single", lambda: virtual_fleet(1)),
    "layers on CPU slots": ("layers", lambda: cpu_fleet(2)),
}


def _pictures(app: Application, models: ReferenceModels, folder: Path, *, with_controlnets: bool = True) -> list[np.ndarray]:
    request = txt2img(sampler_name="Euler a", batch_size=2, do_not_save_grid=True)
    engine = app.models.ensure_loaded()
    original = engine.forge_objects_original
    patched = original.shallow_copy()
    for seed in (1, 2) if with_controlnets else ():
        path = folder / f"{seed}.safetensors"
        if not path.exists():
            write_controlnet(path, build_controlnet(models, seed=seed), layout="ldm" if seed == 1 else "diffusers")
        patched.unet = apply_controlnet_advanced(patched.unet, load_controlnet(path), hint(seed=seed), 1.0, 0.0, 0.8)
    engine.forge_objects_original = patched
    try:
        done = run(request)
    finally:
        engine.forge_objects_original = original
    return [pixels(image) for image in done.images]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("controlnets")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[np.ndarray]]:
    """Pictures from one slot that runs every row alone, in the denoiser and in the ControlNets."""
    pictures: dict[str, list[np.ndarray]] = {}
    with pytest.MonkeyPatch.context() as patch, configured_slots("cpu"):
        patch.setattr(sampling_function, "_call_model", _each_row_alone(with_deferred_controlnets(sampling_function._call_model)))
        for family in FAMILIES:
            with narrow_application(folder / family, family) as (app, models):
                pictures[family] = _pictures(app, models[family], folder / family)
                without = _pictures(app, models[family], folder / family, with_controlnets=False)
                assert any(np.abs(one - other).max() > 2 for one, other in zip(pictures[family], without)), "the ControlNets act"
    return pictures


@pytest.mark.parametrize(
    ("fleet", "family"),
    [
        pytest.param(fleet, family, marks=[pytest.mark.nightly] if family == "sdxl" and fleet.endswith("on 3") else [])
        for fleet in FLEETS
        for family in FAMILIES
    ],
)
def test_a_split_job_with_controlnets_makes_the_whole_jobs_picture(
    fleet: str, family: str, folder: Path, alone: dict[str, list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SamplingSession, "_rows_per_batch", lambda self, replica, share: 1)
    monkeypatch.setattr(decoding, "worth_splitting", lambda *args, **kwargs: False)
    strategy, make_fleet = FLEETS[fleet]
    with make_fleet(), narrow_application(folder / family, family) as (app, models):
        app.options.set("multi_gpu_strategy", strategy)
        pictures = _pictures(app, models[family], folder / family)
    tolerance = 2 if fleet == "one virtual GPU" else 0  # there both branches and pictures run together, which rounds differently
    for picture, expected in zip(pictures, alone[family], strict=True):
        assert np.abs(picture - expected).max() <= tolerance
