"""Whole Flux.1 pictures against diffusers' FluxPipeline: same files, same noise, same noise levels, same text features; sampler, guidance, decoder.

The pipeline runs the very networks that the files were written from; ours are loaded from the files. Text features are our engine's own (T5 and CLIP
have tests against transformers). fp32 throughout.
"""

from __future__ import annotations

from collections import UserList
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)
from torch import Tensor

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.diffusion_engine.base import ForgeDiffusionEngine
from backend.families.inpainting import mask_behind_picture
from backend.loader import load_checkpoint
from backend.sampling.registry import find_sampler
from backend.sampling.sampler_types import SamplerSettings
from backend.sampling.sampling_function import denoise_guided, sampling_cleanup, sampling_prepare
from tests.backend.sampling.toys import one_stream
from tests.support.flux_checkpoints import LAYOUTS, FluxFiles, write_flux

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")

CONFIG = BackendConfig()
ONE_PIXEL_STEP = 1 / 255
STEPS = 4
SIDE = 8


class _Prompts(UserList):  # type: ignore[type-arg]
    distilled_cfg_scale = 3.5
    is_negative_prompt = False


@pytest.fixture(autouse=True)
def _cpu_engine() -> Iterator[None]:
    memory_management.configure(CONFIG, probe_devices(BackendConfig(device_ids=("cpu",))))
    yield
    memory_management.unload_all_models()


def load(tmp_path: Path, layout: str = "original", **changes: Any) -> tuple[FluxFiles, ForgeDiffusionEngine]:
    files = write_flux(tmp_path, layout, **changes)
    return files, load_checkpoint(files.checkpoint, config=CONFIG, additional_modules=files.modules)


def shifted_sigmas(engine: ForgeDiffusionEngine, steps: int = STEPS) -> Tensor:
    """A schedule as the Simple one is: the shifted times, then 0."""
    predictor = engine.forge_objects.unet.model.predictor
    times = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64)
    shift = predictor.shift
    return torch.cat([shift * times / (1 + (shift - 1) * times), torch.zeros(1, dtype=torch.float64)]).float()


class _KarrasVariables(DPMSolverMultistepScheduler):
    """The library's DPM-Solver++ in the variables of k-diffusion's "DPM++ 2M", x = x0 + sigma * noise, in which Forge runs it on flows too."""

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__(
            prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero",
            euler_at_final=True,
        )  # fmt: skip
        self._levels = sigmas

    def _sigma_to_alpha_sigma_t(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), sigma

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, **kwargs: Any) -> None:
        super().set_timesteps(len(self._levels) - 1)
        self.sigmas, self.timesteps = self._levels, self._levels[:-1] * 1000


def make_scheduler(sampler: str, sigmas: Tensor) -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=1.0) if sampler == "Euler" else _KarrasVariables(sigmas)


def library_picture(files: FluxFiles, kind: Any, scheduler: Any, text: dict[str, Tensor], sigmas: Tensor, guidance: float, **fields: Any) -> Tensor:
    pipeline = kind(
        scheduler=scheduler, vae=files.vae, transformer=files.flux, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None
    )
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"height": 8 * SIDE, "width": 8 * SIDE, "sigmas": sigmas[:-1].tolist(), "num_inference_steps": len(sigmas) - 1, **fields}
    return pipeline(  # type: ignore[no-any-return]
        prompt_embeds=text["crossattn"], pooled_prompt_embeds=text["vector"], guidance_scale=guidance, output_type="pt", **arguments
    ).images


def pack(x: Tensor) -> Tensor:
    return FluxPipeline._pack_latents(x, *x.shape)  # type: ignore[no-any-return]


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
) -> Tensor:
    unet = engine.forge_objects.unet

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise_guided(unet, x, sigma, text_cond=text, text_uncond=uncond or text, cond_scale=cfg, image_cond=image_cond)[0]

    sampling_prepare(unet, start)
    latents = find_sampler(sampler).function(denoise, start, sigmas, settings=SamplerSettings(is_flow=True), noise=one_stream())
    sampling_cleanup(unet)
    return latents


def our_picture(engine: ForgeDiffusionEngine, *args: Any, **kwargs: Any) -> Tensor:
    return engine.decode_first_stage(our_latents(engine, *args, **kwargs)).clamp(-1, 1) / 2 + 0.5


def check_same(ours: Tensor, library: Tensor) -> None:
    assert ours.shape == library.shape and library.std() > 0.05, "a picture, not a plane"
    assert (ours - library).abs().mean() < 0.02 * ONE_PIXEL_STEP
    assert (ours - library).abs().max() < ONE_PIXEL_STEP


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M"])
def test_pictures_are_the_pipeline_s(tmp_path: Path, layout: str, sampler: str) -> None:
    files, engine = load(tmp_path, layout)
    prompts = _Prompts(["a red cat", "a green dog"])
    prompts.distilled_cfg_scale = 4.5
    text = engine.get_learned_conditioning(prompts)
    assert isinstance(text, dict) and text["guidance"].tolist() == [4.5, 4.5]
    sigmas = shifted_sigmas(engine)
    noise = torch.randn(2, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    library = library_picture(files, FluxPipeline, make_scheduler(sampler, sigmas), text, sigmas, 4.5, latents=pack(noise))
    ours = our_picture(engine, sampler, sigmas, noise, text)
    check_same(ours, library)
    text["guidance"] = text["guidance"] * 2
    assert (our_picture(engine, sampler, sigmas, noise, text) - ours).abs().mean() > ONE_PIXEL_STEP, "guidance acts"


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M"])
def test_schnell_is_the_pipeline_s(tmp_path: Path, sampler: str) -> None:
    files, engine = load(tmp_path, guidance_embeds=False)
    text = engine.get_learned_conditioning(_Prompts(["a red cat"]))
    assert isinstance(text, dict) and not engine.use_distilled_cfg_scale and "guidance" not in text
    sigmas = shifted_sigmas(engine)
    noise = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    library = library_picture(files, FluxPipeline, make_scheduler(sampler, sigmas), text, sigmas, 0.0, latents=pack(noise))
    check_same(our_picture(engine, sampler, sigmas, noise, text), library)


def test_true_guidance_is_the_pipeline_s(tmp_path: Path) -> None:
    """With a CFG scale above 1 the negative prompt acts, as in the library's true CFG."""
    files, engine = load(tmp_path)
    text, negative = (engine.get_learned_conditioning(_Prompts([prompt])) for prompt in ("a red cat", "dark"))
    assert isinstance(text, dict) and isinstance(negative, dict)
    sigmas = shifted_sigmas(engine)
    noise = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    extra = {"negative_prompt_embeds": negative["crossattn"], "negative_pooled_prompt_embeds": negative["vector"], "true_cfg_scale": 3.0}
    library = library_picture(files, FluxPipeline, make_scheduler("Euler", sigmas), text, sigmas, 3.5, latents=pack(noise), **extra)
    check_same(our_picture(engine, "Euler", sigmas, noise, text, cfg=3.0, uncond=negative), library)


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M"])
def test_img2img_starts_and_ends_as_the_pipeline_s(tmp_path: Path, sampler: str) -> None:
    """From half the way on: (1 - t) x0 + t * noise."""
    files, engine = load(tmp_path)
    text = engine.get_learned_conditioning(_Prompts(["a red cat"]))
    assert isinstance(text, dict)
    sigmas = shifted_sigmas(engine)
    generator = torch.Generator().manual_seed(4)
    picture, noise = torch.rand(1, 3, 8 * SIDE, 8 * SIDE, generator=generator), torch.randn(1, 16, SIDE, SIDE, generator=generator)
    part = sigmas[STEPS // 2 :]
    with torch.no_grad():
        encoded = (files.vae.encode(picture * 2 - 1).latent_dist.mode() - 0.1159) * 0.3611
    start = engine.forge_objects.unet.model.predictor.noise_scaling(part[0], noise, engine.encode_first_stage(picture * 2 - 1))
    library_start = part[0] * noise + (1 - part[0]) * encoded
    assert (start - library_start).abs().max() < 2e-3, "the posterior is narrow"
    if sampler == "Euler":  # the library's pipeline from the picture on, with its own encoding and start
        library = library_picture(
            files, FluxImg2ImgPipeline, make_scheduler(sampler, sigmas), text, sigmas, 3.5, image=picture, strength=0.5, latents=pack(library_start)
        )
    else:
        library = library_picture(files, FluxPipeline, make_scheduler(sampler, part), text, part, 3.5, latents=pack(library_start))
    check_same(our_picture(engine, sampler, part, library_start, text), library)
    assert (our_picture(engine, sampler, part, start, text) - library).abs().mean() < ONE_PIXEL_STEP


def test_fill_is_the_pipeline_s(tmp_path: Path) -> None:
    """Channels of a Fill model: latents, the masked picture's latents, and the mask's pixels."""
    files, engine = load(tmp_path, in_channels=384, out_channels=64)
    assert engine.is_inpaint
    text = engine.get_learned_conditioning(_Prompts(["a red cat"]))
    assert isinstance(text, dict)
    sigmas = shifted_sigmas(engine)
    generator = torch.Generator().manual_seed(4)
    picture = torch.rand(1, 3, 8 * SIDE, 8 * SIDE, generator=generator)
    noise = torch.randn(1, 16, SIDE, SIDE, generator=generator)
    mask = torch.zeros(1, 1, 8 * SIDE, 8 * SIDE)
    mask[..., 5:41, : 4 * SIDE + 3] = 1.0
    with torch.no_grad():
        masked = (files.vae.encode((picture * 2 - 1) * (1 - mask)).latent_dist.mode() - 0.1159) * 0.3611
    given = {"image": picture, "mask_image": mask, "latents": pack(noise), "strength": 1.0}
    library = library_picture(files, FluxFillPipeline, make_scheduler("Euler", sigmas), text, sigmas, 3.5, **given)
    image_cond = mask_behind_picture(mask, masked, factor=8)
    check_same(our_picture(engine, "Euler", sigmas, noise, text, image_cond=image_cond), library)


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M"])
def test_kontext_reads_a_reference_as_the_pipeline_does(tmp_path: Path, sampler: str) -> None:
    """A reference of another size than the picture; true CFG, where both branches see it."""
    files, engine = load(tmp_path)
    text, negative = (engine.get_learned_conditioning(_Prompts([prompt] * 2)) for prompt in ("a red cat", "dark"))
    assert isinstance(text, dict) and isinstance(negative, dict)
    sigmas, generator = shifted_sigmas(engine), torch.Generator().manual_seed(4)
    picture, noise = torch.rand(1, 3, 6 * SIDE, 10 * SIDE, generator=generator), torch.randn(2, 16, SIDE, SIDE, generator=generator)
    extra = {"negative_prompt_embeds": negative["crossattn"], "negative_pooled_prompt_embeds": negative["vector"], "true_cfg_scale": 2.0}
    with torch.no_grad():
        reference = (files.vae.encode(picture[..., :48, :80] * 2 - 1).latent_dist.mode() - 0.1159) * 0.3611
    given = {"image": reference, "latents": pack(noise), "_auto_resize": False, "max_area": (8 * SIDE) ** 2, **extra}
    library = library_picture(files, FluxKontextPipeline, make_scheduler(sampler, sigmas), text, sigmas, 3.5, **given)
    unet = engine.forge_objects.unet = engine.forge_objects.unet.clone()
    unet.set_reference_latents([reference])
    ours = our_picture(engine, sampler, sigmas, noise, text, cfg=2.0, uncond=negative)
    check_same(ours, library)
    unet.set_reference_latents([])
    assert (our_picture(engine, sampler, sigmas, noise, text, cfg=2.0, uncond=negative) - ours).abs().mean() > ONE_PIXEL_STEP, "the reference acts"


def test_a_model_of_edges_or_depth_is_the_pipeline_s(tmp_path: Path) -> None:
    """Channels of a Canny or Depth model: the picture's latents, then those of the edges."""
    files, engine = load(tmp_path, in_channels=128, out_channels=64)
    assert not engine.is_inpaint and engine.takes_control_picture
    text = engine.get_learned_conditioning(_Prompts(["a red cat"]))
    assert isinstance(text, dict)
    sigmas, generator = shifted_sigmas(engine), torch.Generator().manual_seed(4)
    noise, edges = torch.randn(1, 16, SIDE, SIDE, generator=generator), torch.randn(1, 16, SIDE, SIDE, generator=generator)
    library = library_picture(
        files, FluxControlPipeline, make_scheduler("Euler", sigmas), text, sigmas, 3.5, control_image=pack(edges), latents=pack(noise)
    )
    unet = engine.forge_objects.unet = engine.forge_objects.unet.clone()
    unet.extra_concat_condition = edges
    check_same(our_picture(engine, "Euler", sigmas, noise, text), library)


def test_the_model_is_saved_as_one_file_that_loads(tmp_path: Path) -> None:
    _, engine = load(tmp_path)
    engine.save_checkpoint(tmp_path / "whole.safetensors")
    again = load_checkpoint(tmp_path / "whole.safetensors", config=CONFIG)
    for before, after in ((_networks(engine)[index], _networks(again)[index]) for index in range(2)):
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def _networks(engine: ForgeDiffusionEngine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return engine.forge_objects.unet.model.diffusion_model.state_dict(), engine.first_stage_model.state_dict()
