"""Whole pictures of flow models, ours and the libraries' pipelines': same files, same noise, same noise levels, same text features."""

from __future__ import annotations

import itertools
from collections import UserList
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.diffusion_engine.base import ForgeDiffusionEngine
from backend.loader import load_checkpoint
from backend.sampling.registry import find_sampler
from backend.sampling.sampler_types import SamplerSettings
from backend.sampling.sampling_function import denoise_guided, sampling_cleanup, sampling_prepare
from modules.samplers.cfg_denoiser import is_truncated
from tests.backend.sampling.toys import one_stream

CONFIG = BackendConfig()
ONE_PIXEL_STEP = 1 / 255
STEPS = 4
SIDE = 8
"""Latents per side."""


class Prompts(UserList):  # type: ignore[type-arg]
    """A list of prompts as jobs pass them."""

    distilled_cfg_scale = 3.5
    is_negative_prompt = False


@contextmanager
def cpu_engine() -> Iterator[None]:
    """The CPU as the only device."""
    memory_management.configure(CONFIG, probe_devices(BackendConfig(device_ids=("cpu",))))
    try:
        yield
    finally:
        memory_management.unload_all_models()


def load(checkpoint: Path, modules: tuple[Path, ...] = ()) -> ForgeDiffusionEngine:
    return load_checkpoint(checkpoint, config=CONFIG, additional_modules=modules)


def shifted_sigmas(engine: ForgeDiffusionEngine, steps: int = STEPS) -> Tensor:
    """A schedule as the Simple one is: the shifted times, then 0."""
    times, shift = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64), engine.forge_objects.unet.model.predictor.shift
    return torch.cat([shift * times / (1 + (shift - 1) * times), torch.zeros(1, dtype=torch.float64)]).float()


class KarrasVariables(DPMSolverMultistepScheduler):
    """The library's DPM-Solver++ in the variables of k-diffusion's "DPM++ 2M", x = x0 + sigma * noise, in which Forge runs it on flows too."""

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__(
            prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero",
            euler_at_final=True,
        )  # fmt: skip
        self._levels = sigmas

    def _sigma_to_alpha_sigma_t(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), sigma

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, **kwargs: Any) -> None:
        """Pipelines look for `sigmas` in the signature."""
        super().set_timesteps(len(self._levels) - 1)
        self.sigmas, self.timesteps = self._levels, self._levels[:-1] * 1000


def make_scheduler(sampler: str, sigmas: Tensor) -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=1.0) if sampler == "Euler" else KarrasVariables(sigmas)


@torch.inference_mode()
def our_latents(
    engine: ForgeDiffusionEngine,
    sampler: str,
    sigmas: Tensor,
    start: Tensor,
    text: Any,
    image_cond: Tensor | None = None,
    cfg: float = 1.0,
    uncond: Any = None,
    skipped_late: float = 0.0,
) -> Tensor:
    """`skipped_late`: the share of the last steps that skip the negative prompt, for samplers with one pass a step."""
    unet, calls = engine.forge_objects.unet, itertools.count()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        scale = 1.0 if is_truncated(next(calls), len(sigmas) - 1, skipped_late) else cfg
        return denoise_guided(
            unet, x, sigma, text_cond=text, text_uncond=uncond or text, cond_scale=scale, image_cond=image_cond, text_repeats=False
        )[0]  # fmt: skip

    sampling_prepare(unet, start)
    latents = find_sampler(sampler).function(denoise, start, sigmas, settings=SamplerSettings(is_flow=True), noise=one_stream())
    sampling_cleanup(unet)
    return latents


def our_picture(engine: ForgeDiffusionEngine, *args: Any, **kwargs: Any) -> Tensor:
    return engine.decode_first_stage(our_latents(engine, *args, **kwargs)).clamp(-1, 1) / 2 + 0.5


def library_picture(pipeline: Any, *args: Any, sigmas: Tensor, **fields: Any) -> Tensor:
    """What a library's pipeline makes with these noise levels, (B, 3, H, W) 0..1."""
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"height": 8 * SIDE, "width": 8 * SIDE, "sigmas": sigmas[:-1].tolist(), "num_inference_steps": len(sigmas) - 1, **fields}
    return pipeline(*args, output_type="pt", **arguments).images  # type: ignore[no-any-return]


def random_picture(seed: int = 4, *, height: int = 8 * SIDE, width: int = 8 * SIDE) -> Tensor:
    """(1, 3, H, W), 0..1."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def start_from_picture(
    engine: ForgeDiffusionEngine, picture: Tensor, encoded: Tensor, noise: Tensor, level: Tensor, tolerance: float = 2e-3
) -> Tensor:
    """img2img's first latents, (1 - t) x0 + t * noise, of the picture as the library encoded it; ours differ by the width of the posterior."""
    start = level * noise + (1 - level) * encoded
    ours = engine.forge_objects.unet.model.predictor.noise_scaling(level, noise, engine.encode_first_stage(picture * 2 - 1))
    assert (ours - start).abs().max() < tolerance, "the posterior is narrow"
    return start


def check_saved(engine: ForgeDiffusionEngine, path: Path) -> ForgeDiffusionEngine:
    """The whole model is written as one file, from which the same networks are loaded."""
    engine.save_checkpoint(path)
    again = load(path)
    for find in (lambda one: one.forge_objects.unet.model.diffusion_model, lambda one: one.first_stage_model, lambda one: one.cond_stage_model):
        before, after = find(engine).state_dict(), find(again).state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    return again


def check_same(ours: Tensor, library: Tensor) -> None:
    assert ours.shape == library.shape and library.std() > 0.05, "a picture, not a plane"
    assert (ours - library).abs().mean() < 0.02 * ONE_PIXEL_STEP
    assert (ours - library).abs().max() < ONE_PIXEL_STEP
