"""How near are pictures of displaced tiles to those of exact ones? The demo checkpoint, on two CPU slots."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks._multi_slot import TWO_SLOTS, install_application, use_slots
from modules.application import Application
from modules.processing import StableDiffusionProcessingTxt2Img, process_images
from tools.measure import Bench, Metrics, Variant

ROOT_DIR = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT_DIR / "models" / "Stable-diffusion" / "demo-shapes-64.safetensors"
STEPS, SIDE_PX, CFG = 20, 384, 5.0
PROMPTS = ("a red circle on a blue background", "a green square and a yellow circle", "a blue star", "two red triangles on a white background")
WINDOW, SPREAD = 11, 1.5
PICTURE = "picture s"


class _Pictures:
    """Pictures by round: the exact one of a round is what the round's others are compared with."""

    def __init__(self, app: Application) -> None:
        self._app, self._exact = app, dict[int, tuple[np.ndarray, float]]()
        self._rounds: dict[int | None, int] = {}

    def compare(self, exact_steps: int | None) -> Metrics:
        """Make the round's picture with tiles that are exact for so many steps (None: for all)."""
        number = self._rounds[exact_steps] = self._rounds.get(exact_steps, -1) + 1
        if number not in self._exact:
            self._exact[number] = self._make(number, None)
        picture, seconds = self._exact[number] if exact_steps is None else self._make(number, exact_steps)
        return {PICTURE: seconds, **differences(picture, self._exact[number][0])}

    def _make(self, number: int, exact_steps: int | None) -> tuple[np.ndarray, float]:
        """The picture, and the seconds of its request."""
        options = {"multi_gpu_strategy": "tiles", "multi_gpu_tiles": "exact" if exact_steps is None else "displaced"}
        options |= {} if exact_steps is None else {"multi_gpu_exact_steps": exact_steps}
        request = StableDiffusionProcessingTxt2Img(
            prompt=PROMPTS[number % len(PROMPTS)], seed=number, steps=STEPS, width=SIDE_PX, height=SIDE_PX, sampler_name="Euler", cfg_scale=CFG,
            do_not_save_grid=True, do_not_save_samples=True, override_settings=options,
        )  # fmt: skip
        began_s = time.perf_counter()
        done = process_images(request)
        seconds = time.perf_counter() - began_s
        if ("Tiles: displaced" in done.infotexts[0]) is (exact_steps is None):
            raise AssertionError(f"asked for {exact_steps} exact steps, made: {done.infotexts[0]}")
        return np.asarray(done.images[0].convert("RGB")).astype(np.float32), seconds


def differences(picture: np.ndarray, exact: np.ndarray) -> Metrics:
    """Mean difference of 255, peak signal-to-noise ratio in dB (99 for equal pictures), and structural similarity."""
    square = float(np.square(picture - exact).mean())
    return {
        "mean difference of 255": float(np.abs(picture - exact).mean()),
        "PSNR dB": 99.0 if square == 0 else 10 * float(np.log10(255**2 / square)),
        "SSIM": structural_similarity(picture, exact),
    }


def structural_similarity(one: np.ndarray, other: np.ndarray) -> float:
    """SSIM of the luma, with a Gaussian window of 11x11. Wang et al. 2004, "Image quality assessment", eq. 13."""
    luma = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    x, y = (torch.from_numpy(picture @ luma)[None, None] for picture in (one, other))
    places = torch.arange(WINDOW, dtype=torch.float32) - WINDOW // 2
    bell = torch.exp(-(places**2) / (2 * SPREAD**2))
    window = (bell[:, None] * bell[None]) / bell.sum() ** 2

    def mean(tensor: Tensor) -> Tensor:
        return functional.conv2d(tensor, window[None, None])

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return float(similarity.mean())


def make_variants() -> Mapping[str, Variant]:
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    target = folder / "models" / "Stable-diffusion" / CHECKPOINT.name
    target.parent.mkdir(parents=True)
    shutil.copyfile(CHECKPOINT, target)
    app = install_application(folder)
    use_slots(TWO_SLOTS)
    pictures = _Pictures(app)
    return {
        "exact": partial(pictures.compare, None),
        **{f"displaced after {steps} steps": partial(pictures.compare, steps) for steps in (8, 4, 1)},
    }


BENCH = Bench(
    question=(
        f"How near are pictures of displaced tiles to those of exact ones? The demo checkpoint, {SIDE_PX}x{SIDE_PX}, {STEPS} Euler steps, "
        f"CFG {CFG:g}, two CPU slots, a prompt and a seed each round. The slots share their memory, so nothing travels, and displaced tiles can "
        "hardly be faster here."
    ),
    make_variants=make_variants,
    baseline="exact",
    num_rounds=4,
    num_warmups=0,
    time_metric=PICTURE,
    packages=("torch", "diffusers", "transformers"),
)
