"""Jobs of the product on one and two CPU slots, for benchmarks of plans: the same narrow SD1.x checkpoint, one core per slot, fp32."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from modules.application import Application, build_application, install
from modules.launch.cmd_args import config_for_tests
from modules.processing import StableDiffusionProcessingTxt2Img, process_images
from tests.support.checkpoints import write_checkpoint
from tools.measure import Bench, Metrics, Variant

WIDTH, CFG = 64, 7.0
TWO_SLOTS = ("cpu", "cpu")
UNET_PHASE = "UNet phase s"
TOLERANCE = 2
"""Of 255: one slot runs both branches in one batch, whose sums are rounded otherwise."""


class _TimedRequest(StableDiffusionProcessingTxt2Img):
    """Measures the time of sampling, from noise to latents."""

    sampling_s = 0.0

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        began_s = time.perf_counter()
        latents = super().sample(*args, **kwargs)
        self.sampling_s += time.perf_counter() - began_s
        return latents


def use_slots(device_ids: tuple[str, ...]) -> None:
    """Use these slots from now on, each with one thread."""
    torch.set_num_threads(1)
    config = BackendConfig(multi_gpu=True, device_ids=device_ids, cpu_threads_per_slot=1)
    memory_management.configure(config, probe_devices(config))


def make_application(*, base_width: int = WIDTH) -> Application:
    """An application with a checkpoint of SD1.x's layout in a temporary folder, which exists until the process ends. `base_width`: channels of the
    UNet's outer level."""
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    write_checkpoint(folder / "models" / "Stable-diffusion" / "narrow.safetensors", "sd15", width=base_width)
    return install_application(folder)


def install_application(folder: Path) -> Application:
    """An application over a folder of data, which saves nothing."""
    app = build_application(config_for_tests(folder))
    install(app)
    app.options.live_previews_enable = False
    app.options.samples_save = app.options.grid_save = False
    return app


def run_job(app: Application, strategy: str, *, num_images: int, num_steps: int, side_px: int, cfg: float = CFG) -> tuple[Metrics, list[np.ndarray]]:
    """The sampling time in seconds, and the pictures."""
    app.options.set("multi_gpu_strategy", strategy)
    request = _TimedRequest(
        prompt="a red cat", negative_prompt="a dog", seed=1, steps=num_steps, width=side_px, height=side_px, sampler_name="Euler", cfg_scale=cfg,
        batch_size=num_images, do_not_save_grid=True, do_not_save_samples=True,
    )  # fmt: skip
    done = process_images(request)
    return {UNET_PHASE: request.sampling_s}, [np.asarray(image.convert("RGB")).astype(int) for image in done.images]


def make_job_bench(strategy: str, *, num_images: int, num_steps: int, at_least: float, num_rounds: int = 7, side_px: int = 384) -> Bench:
    """One slot against two. First, their pictures are compared.

    Small pictures favor one slot, which runs both branches in one batch: below 512 pixels a batch of two takes less time per row on a CPU.
    """

    def make_variants() -> Mapping[str, Variant]:
        app = make_application()
        use_slots(TWO_SLOTS)

        def job(chosen: str, steps: int) -> tuple[Metrics, list[np.ndarray]]:
            return run_job(app, chosen, num_images=num_images, num_steps=steps, side_px=side_px)

        pictures = [job(chosen, 4)[1] for chosen in ("single", strategy)]
        worst = max(int(np.abs(one - other).max()) for one, other in zip(*pictures))
        if worst > TOLERANCE:
            raise AssertionError(f"the pictures of one slot and of two differ by {worst} of 255; {TOLERANCE} are rounding.")
        return {"one slot": lambda: job("single", num_steps)[0], "two slots": lambda: job(strategy, num_steps)[0]}

    images = "1 image" if num_images == 1 else f"{num_images} images"
    return Bench(
        question=(
            f"How much faster are two CPU slots of one core each than one, {images} with CFG, strategy {strategy}, {num_steps} Euler steps? "
            f"Timed: the UNet phase, from noise to latents. A narrow SD1.x network ({WIDTH} to {4 * WIDTH} channels), {side_px} pixels, fp32. "
            f"Asked for: at least {at_least:.2f}x."
        ),
        make_variants=make_variants,
        baseline="one slot",
        num_rounds=num_rounds,
        work_per_call=num_images * num_steps,
        work_unit="image steps",
        packages=("torch", "diffusers", "transformers"),
        time_metric=UNET_PHASE,
    )
