"""A batch of several initial pictures under several slots: each row gets the hint of its own picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modules.api.script_args import build_script_args
from modules.processing import process_images
from modules.scripts.without_page import build_controls
from tests.support.controlnets import build_controlnet, write_controlnet
from tests.support.extensions import loaded_builtin
from tests.support.fleets import virtual_fleet
from tests.support.narrow_application import img2img, narrow_application, pixels

FIELDS: dict[str, Any] = {"steps": 3, "batch_size": 2, "denoising_strength": 0.8, "do_not_save_grid": True, "do_not_save_samples": True}


def test_each_picture_keeps_its_own_hint_under_replicas(tmp_path: Path) -> None:
    with virtual_fleet(2), narrow_application(tmp_path, "sd15", is_shallow=True) as (app, models), loaded_builtin(app, "sd_forge_controlnet"):
        write_controlnet(tmp_path / "models" / "ControlNet" / "guide.safetensors", build_controlnet(models["sd15"], residual_scale=0.5))
        build_controls(app)

        def run(strategy: str) -> list[np.ndarray]:
            app.options.data["multi_gpu_strategy"] = strategy
            p, runner = img2img(seed=1, init_images=pictures, **FIELDS), app.script_runners["img2img"]
            unit = {"model": "guide", "module": "canny"}
            _, arguments = build_script_args(runner, script_name=None, script_args=[], alwayson_scripts={"ControlNet": {"args": [unit]}})
            p.is_api, p.scripts, p.script_args = True, runner, tuple(arguments)
            return [pixels(image) for image in app.jobs.submit(None, "img2img", lambda: process_images(p)).wait(timeout_s=300).images]

        pictures = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)) for seed in (3, 4)]
        one_slot, _measuring, replicas = run("single"), run("replicas"), run("replicas")
        assert len(one_slot) == len(replicas) == 2
        assert [int(np.abs(one - other).max()) <= 1 for one, other in zip(one_slot, replicas)] == [True, True]
