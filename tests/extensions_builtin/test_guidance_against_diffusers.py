"""FreeU, PAG and SAG against diffusers' own functions and pipelines, on one step of a narrow UNet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import CrossAttnStoreProcessor, StableDiffusionSAGPipeline
from diffusers.utils.torch_utils import apply_freeu
from torch import Tensor

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.loader import load_checkpoint
from backend.patcher.unet import UnetPatcher
from backend.sampling.sampling_function import denoise_guided
from modules_forge.unet_patching import StepWindow
from tests.support.checkpoints import ReferenceModels, write_checkpoint
from tests.support.extensions import import_builtin

CFG, TIMESTEP, SIDE = 4.0, 500, 32
CLOSE = 2e-3
"""Our noise level is the timestep's; the rest is the order of sums in fp32."""


class _Case:
    """A step at one timestep: ours on x0, the library's on noise predictions."""

    def __init__(self, folder: Path) -> None:
        memory_management.configure(BackendConfig(), probe_devices(BackendConfig(device_ids=("cpu",))))
        self.models: ReferenceModels = write_checkpoint(folder / "model.safetensors", "sd15")
        self.unet: UnetPatcher = load_checkpoint(folder / "model.safetensors", config=BackendConfig()).forge_objects.unet
        draw = torch.Generator().manual_seed(3)
        self.scheduler = DDIMScheduler(**self.models.scheduler_config(), clip_sample=False)
        known = self.scheduler.alphas_cumprod[TIMESTEP]
        self.sigma = ((1 - known) / known).sqrt().view(1)
        self.x = torch.randn(1, 4, SIDE, SIDE, generator=draw) * (self.sigma**2 + 1) ** 0.5
        self.cond, self.uncond = (torch.randn(1, 7, self.models.unet.config.cross_attention_dim, generator=draw) for _ in range(2))

    def denoise(self, unet: UnetPatcher, scale: float = CFG) -> Tensor:
        return denoise_guided(unet, self.x, self.sigma, text_cond=self.cond, text_uncond=self.uncond, cond_scale=scale)[0]

    @torch.no_grad()
    def noise_in(self, x_vp: Tensor, text: Tensor) -> Tensor:
        """The library's prediction for latents of variance 1."""
        noise: Tensor = self.models.unet(x_vp, torch.tensor(TIMESTEP), encoder_hidden_states=text).sample
        return noise

    @property
    def x_vp(self) -> Tensor:
        return self.x / (self.sigma**2 + 1) ** 0.5

    def to_x0(self, noise: Tensor) -> Tensor:
        return self.x - self.sigma * noise


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Case]:
    with torch.inference_mode(False):
        yield _Case(tmp_path_factory.mktemp("guidance"))


def with_middle(case: _Case, processor: Any) -> Any:
    """The library's UNet with another processor in the middle block's self-attention; returns what undoes it."""
    before = case.models.unet.attn_processors
    changed = {name: processor if "mid_block" in name and ".attn1." in name else one for name, one in before.items()}
    case.models.unet.set_attn_processor(changed)
    return lambda: case.models.unet.set_attn_processor(before)


def test_perturbed_attention_guidance_is_that_of_the_library(case: _Case) -> None:
    script = import_builtin("sd_forge_perturbed_attention/scripts", "forge_perturbed_attention")
    ours = case.unet.clone()
    ours.set_model_sampler_post_cfg_function(script.PerturbedGuidance(3.0, 0.0, StepWindow(None, 0.0, 1.0)))
    cond, uncond = case.noise_in(case.x_vp, case.cond), case.noise_in(case.x_vp, case.uncond)
    undo = with_middle(case, PAGIdentitySelfAttnProcessor2_0())
    try:
        perturbed = case.noise_in(case.x_vp.repeat(2, 1, 1, 1), case.cond.repeat(2, 1, 1))[1:]  # the processor's first half is as usual
    finally:
        undo()
    expected = case.to_x0(uncond + CFG * (cond - uncond) + 3.0 * (cond - perturbed))
    plain = case.denoise(case.unet)
    assert (expected - plain).abs().max() > 20 * CLOSE
    assert (case.denoise(ours) - expected).abs().max() < CLOSE


def test_the_scale_of_perturbed_guidance_falls_by_its_attenuation(case: _Case) -> None:
    script = import_builtin("sd_forge_perturbed_attention/scripts", "forge_perturbed_attention")
    ours = case.unet.clone()
    ours.set_model_sampler_post_cfg_function(script.PerturbedGuidance(3.0, 50.0, StepWindow(None, 0.0, 1.0)))
    plain = case.denoise(case.unet)
    first, second, third = (case.denoise(ours) - plain for _ in range(3))
    assert torch.allclose(second, first / 2, atol=1e-4)
    assert not third.any()


def test_self_attention_guidance_is_that_of_the_library(case: _Case) -> None:
    sag = import_builtin("sd_forge_sag", "self_attention_guidance")
    ours = case.unet.clone()
    sag.SelfAttentionGuidance(0.75, 1.0, 1.0, guides_uncond=True).add_to(ours)  # the library's blur and threshold are 1
    cond, keeper = case.noise_in(case.x_vp, case.cond), CrossAttnStoreProcessor()
    undo = with_middle(case, keeper)
    try:
        uncond = case.noise_in(case.x_vp, case.uncond)
    finally:
        undo()
    side = SIDE // 8
    host = SimpleNamespace(unet=case.models.unet, scheduler=case.scheduler)
    degraded = StableDiffusionSAGPipeline.sag_masking(host, case.to_x0(uncond), keeper.attention_probs, (side, side), torch.tensor(TIMESTEP), uncond)
    expected = case.to_x0(uncond + CFG * (cond - uncond) + 0.75 * (uncond - case.noise_in(degraded, case.uncond)))
    assert (expected - case.denoise(case.unet)).abs().max() > 10 * CLOSE
    assert (case.denoise(ours) - expected).abs().max() < CLOSE


@pytest.mark.parametrize("size", [(8, 8), (5, 12), (1, 6)])
def test_freeu_weakens_skips_as_the_library_does(size: tuple[int, int]) -> None:
    freeu = import_builtin("sd_forge_freeu", "freeu_blocks")
    draw = torch.Generator().manual_seed(1)
    hidden, skip = torch.randn(2, 6, *size, generator=draw), torch.randn(2, 4, *size, generator=draw)
    library_hidden, library_skip = apply_freeu(0, hidden.clone(), skip.clone(), s1=0.3, s2=0.2, b1=1.4, b2=1.6)
    if min(size) > 1:  # the library leaves out half of its square in a single row
        assert torch.allclose(freeu.scale_low_frequencies(skip, 0.3), library_skip, atol=1e-5)
    ours = freeu.scale_backbone(hidden, 1.4)
    assert torch.equal(ours[:, 3:], library_hidden[:, 3:])
    mean = hidden.mean(dim=1)
    for row in range(2):
        most, least = mean[row].argmax(), mean[row].argmin()
        assert torch.allclose(ours[row, :3].flatten(1)[:, most], library_hidden[row, :3].flatten(1)[:, most]), "where the mean is highest: all of b"
        assert torch.allclose(ours[row, :3].flatten(1)[:, least], hidden[row, :3].flatten(1)[:, least]), "where it is lowest: nothing"
    assert torch.isfinite(freeu.scale_backbone(torch.ones(1, 4, 2, 2), 1.5)).all()


def test_freeu_acts_where_the_channels_say_and_when_its_window_is_open(case: _Case) -> None:
    freeu = import_builtin("sd_forge_freeu", "freeu_blocks")
    window = StepWindow(None, 0.0, 1.0)
    channels = case.unet.model.diffusion_model.config["model_channels"]
    ours = freeu.patch_freeu(case.unet, {4 * channels: (1.5, 0.9), 2 * channels: (1.6, 0.2)}, window)
    plain = case.denoise(case.unet)
    assert (case.denoise(ours) - plain).abs().max() > 20 * CLOSE
    assert not (case.denoise(freeu.patch_freeu(case.unet, {7: (1.5, 0.9)}, window)) - plain).any()
    window.is_open = False
    assert not (case.denoise(ours) - plain).any()
