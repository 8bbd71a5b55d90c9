"""Does the sampling loop on one slot cost more than diffusers' pipeline with the same weights?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.patcher.unet import UnetPatcher
from backend.sampling.noise import ImageNoise
from backend.sampling.registry import find_sampler
from backend.sampling.sampler_types import SamplerSettings
from backend.sampling.sampling_function import denoise_guided, sampling_cleanup, sampling_prepare
from backend.text_processing.clip_tokenizer import build_clip_tokenizer
from tests.support.checkpoints import build_models
from tools.measure import Bench, Metrics, Variant

WIDTH, SIDE, NUM_STEPS, CFG = 64, 16, 20, 7.0


def _with_cpu_seconds(run: Callable[[], Tensor]) -> Variant:
    """Adds the call's CPU seconds to its wall time: a fairer number if the machine is busy."""

    def call() -> Metrics:
        began_s = time.process_time()
        run()
        return {"CPU s": time.process_time() - began_s}

    return call


def _make_pipeline(models: Any, scheduler: Any) -> Any:
    pipeline = StableDiffusionPipeline(
        vae=models.vae, text_encoder=models.text_encoders[0], tokenizer=build_clip_tokenizer(), unet=models.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_variants() -> Mapping[str, Variant]:
    """The same narrow SD1.x network (64 to 256 channels), conditions and noise for both; 128 pixels, Euler, CFG 7, latents in and out."""
    torch.set_num_threads(1)
    memory_management.configure(BackendConfig(), probe_devices(BackendConfig(device_ids=("cpu",))))
    models = build_models(Path("none"), "sd15", width=WIDTH)
    scheduler = EulerDiscreteScheduler.from_config({**models.scheduler_config(), "timestep_spacing": "linspace", "use_karras_sigmas": True})
    scheduler.set_timesteps(NUM_STEPS)
    sigmas_T, cond_BLC, uncond_BLC = scheduler.sigmas, torch.randn(1, 77, 64), torch.randn(1, 77, 64)
    noise_BCHW = torch.randn(1, 4, SIDE, SIDE)
    pipeline = _make_pipeline(models, scheduler)
    unet = UnetPatcher.from_model(KModel(models.unet, Prediction()))

    def run_library() -> Tensor:
        result: Tensor = pipeline(
            prompt_embeds=cond_BLC, negative_prompt_embeds=uncond_BLC, latents=noise_BCHW, height=8 * SIDE, width=8 * SIDE,
            num_inference_steps=NUM_STEPS, guidance_scale=CFG, output_type="latent",
        ).images  # fmt: skip
        return result

    @torch.inference_mode()
    def run_ours() -> Tensor:
        sampling_prepare(unet, noise_BCHW)
        latents_BCHW = find_sampler("Euler").function(
            lambda x, sigma: denoise_guided(unet, x, sigma, text_cond=cond_BLC, text_uncond=uncond_BLC, cond_scale=CFG)[0],
            noise_BCHW * sigmas_T[0], sigmas_T, settings=SamplerSettings(), noise=ImageNoise((4, SIDE, SIDE), [0]),
        )  # fmt: skip
        sampling_cleanup(unet)
        return latents_BCHW

    torch.testing.assert_close(run_ours(), run_library(), rtol=1e-3, atol=1e-3)
    return {"diffusers pipeline": _with_cpu_seconds(run_library), "one slot": _with_cpu_seconds(run_ours)}


BENCH = Bench(
    question=(
        "Does the sampling loop on one slot cost more than diffusers' pipeline with the same weights? One torch thread, fp32, a narrow SD1.x "
        "network (64 to 256 channels), 128 pixels, 20 Euler steps with CFG 7, latents in and latents out; both answers are compared first."
    ),
    make_variants=make_variants,
    baseline="diffusers pipeline",
    num_rounds=25,
    work_per_call=NUM_STEPS,
    work_unit="steps",
    packages=("torch", "diffusers"),
)
