"""Pictures with ControlNets against diffusers' ControlNet pipelines: same files, hints, prompts, noise and noise levels; fp32.

The pipelines define ranges in steps, we in timesteps (like Forge): the tests use fractions that switch at the same step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
)
from torch import Tensor

from backend import memory_management
from backend.args import BackendConfig
from backend.controlnet_loader import load_controlnet
from backend.devices.probing import probe_devices
from backend.diffusion_engine.base import ForgeDiffusionEngine
from backend.loader import load_checkpoint
from backend.patcher.controlnet import ControlBase, ControlNetError, apply_controlnet_advanced, zero_weights
from backend.patcher.unet import UnetPatcher
from backend.sampling.registry import find_sampler
from backend.sampling.sampler_types import SamplerSettings
from backend.sampling.sampling_function import denoise_guided, sampling_cleanup, sampling_prepare
from backend.text_processing.clip_tokenizer import EOS_TOKEN_ID, build_clip_tokenizer
from tests.backend.sampling.toys import one_stream
from tests.parity.test_pipeline_parity import NEGATIVE, PROMPT, _Prompts
from tests.support.checkpoints import ReferenceModels, build_models, write_checkpoint
from tests.support.controlnets import build_adapter, build_controlnet, hint, write_adapter, write_controlnet

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")

CONFIG = BackendConfig()
NUM_STEPS, CFG, SIDE_PX = 6, 5.0, 64
ONE_PIXEL_STEP = 1 / 255
ADAPTERS = [("full_adapter", "diffusers", 3), ("full_adapter", "ldm", 1), ("light_adapter", "diffusers", 3), ("light_adapter", "ldm", 3)]


@pytest.fixture(autouse=True)
def _cpu_engine() -> Iterator[None]:
    memory_management.configure(CONFIG, probe_devices(BackendConfig(device_ids=("cpu",))))
    yield
    memory_management.unload_all_models()


class Loaded:
    """A checkpoint with two ControlNets: the library's networks, and ours loaded from the files."""

    def __init__(self, family: str, folder: Path) -> None:
        self.models: ReferenceModels = write_checkpoint(folder / "model.safetensors", family)
        self.controlnets = [build_controlnet(self.models, seed=seed) for seed in (1, 2)]
        layouts = ("ldm", "diffusers")
        paths = [write_controlnet(folder / f"{layout}.safetensors", net, layout=layout) for net, layout in zip(self.controlnets, layouts)]
        self.engine: ForgeDiffusionEngine = load_checkpoint(folder / "model.safetensors", config=CONFIG)
        self.links: list[ControlBase] = [load_controlnet(path) for path in paths]
        self._plain: dict[tuple[int, float], Tensor] = {}

    def plain_picture(self, batch: int = 1, cfg: float = CFG) -> Tensor:
        """Ours without anything added, made once."""
        if (batch, cfg) not in self._plain:
            self._plain[batch, cfg] = self.our_picture(self.unet, _noise(batch), cfg)
        return self._plain[batch, cfg]

    def scheduler(self) -> Any:
        config = {**self.models.scheduler_config(), "timestep_spacing": "linspace", "steps_offset": 0}
        scheduler = EulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(NUM_STEPS)
        return scheduler

    def library_picture(self, noise: Tensor, hints: Any, controlnets: Any, cfg: float = CFG, is_adapter: bool = False, **arguments: Any) -> Tensor:
        models = self.models
        parts: dict[str, Any] = {"unet": models.unet, "vae": models.vae, "scheduler": self.scheduler(), "text_encoder": models.text_encoders[0]}
        pad = EOS_TOKEN_ID if models.family != "sd20" else 0
        parts |= {"tokenizer": build_clip_tokenizer(pad_token_id=pad), "adapter" if is_adapter else "controlnet": controlnets}
        if models.family == "sdxl":
            parts |= {"tokenizer_2": build_clip_tokenizer(pad_token_id=0), "text_encoder_2": models.text_encoders[1]} | (
                {} if is_adapter else {"add_watermarker": False}
            )
            kind: Any = StableDiffusionXLAdapterPipeline if is_adapter else StableDiffusionXLControlNetPipeline
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            kind = StableDiffusionAdapterPipeline if is_adapter else StableDiffusionControlNetPipeline
        pipeline = kind(**parts)
        pipeline.set_progress_bar_config(disable=True)
        batch = noise.shape[0]
        result = pipeline(
            prompt=[PROMPT] * batch, negative_prompt=[NEGATIVE] * batch, image=hints, height=SIDE_PX, width=SIDE_PX, guidance_scale=cfg,
            num_inference_steps=NUM_STEPS, latents=noise, output_type="pt", **arguments,
        )  # fmt: skip
        images = result.images  # the adapters' pipelines always return arrays (B, H, W, C)
        return images if isinstance(images, Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def our_picture(self, unet: UnetPatcher, noise: Tensor, cfg: float = CFG) -> Tensor:
        batch = noise.shape[0]
        cond = self.engine.get_learned_conditioning(_Prompts([PROMPT] * batch, side_px=SIDE_PX))
        uncond = self.engine.get_learned_conditioning(_Prompts([NEGATIVE] * batch, side_px=SIDE_PX, is_negative_prompt=True))

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return denoise_guided(unet, x, sigma, text_cond=cond, text_uncond=uncond, cond_scale=cfg)[0]

        sigmas = self.scheduler().sigmas
        start = unet.model.predictor.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), max_denoise=False)
        sampling_prepare(unet, start)
        latents = find_sampler("Euler").function(denoise, start, sigmas, settings=SamplerSettings(), noise=one_stream())
        sampling_cleanup(unet)
        return self.engine.decode_first_stage(latents).clamp(-1, 1) / 2 + 0.5

    @property
    def unet(self) -> UnetPatcher:
        return self.engine.forge_objects.unet


@pytest.fixture(scope="module", params=["sd15", "sd20", "sdxl"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    memory_management.configure(CONFIG, probe_devices(BackendConfig(device_ids=("cpu",))))
    return Loaded(request.param, tmp_path_factory.mktemp(request.param))


def _noise(batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, SIDE_PX // 8, SIDE_PX // 8, generator=torch.Generator().manual_seed(3))


def _assert_same(ours: Tensor, library: Tensor, without: Tensor) -> None:
    assert (library - without).abs().mean() > 0.5 * ONE_PIXEL_STEP, "the ControlNet acts"
    assert (ours - library).abs().mean() < 0.02 * ONE_PIXEL_STEP
    assert (ours - library).abs().max() < ONE_PIXEL_STEP


@pytest.mark.parametrize("number", [0, 1], ids=["ldm", "diffusers"])
def test_one_controlnet(loaded: Loaded, number: int) -> None:
    noise = _noise(2)
    library = loaded.library_picture(noise, hint(batch=2), loaded.controlnets[number], controlnet_conditioning_scale=0.8)
    unet = apply_controlnet_advanced(loaded.unet, loaded.links[number], hint(batch=2), 0.8, 0.0, 1.0)
    _assert_same(loaded.our_picture(unet, noise), library, loaded.plain_picture(2))


def test_one_hint_for_a_batch(loaded: Loaded) -> None:
    noise = _noise(2)
    library = loaded.library_picture(noise, hint().expand(2, -1, -1, -1), loaded.controlnets[0])
    unet = apply_controlnet_advanced(loaded.unet, loaded.links[0], hint(), 1.0, 0.0, 1.0)
    _assert_same(loaded.our_picture(unet, noise), library, loaded.plain_picture(2))


def test_several_controlnets_add_up(loaded: Loaded) -> None:
    noise, hints = _noise(), [hint(seed=5), hint(seed=6)]
    library = loaded.library_picture(noise, hints, loaded.controlnets, controlnet_conditioning_scale=[0.7, 0.4])
    unet = apply_controlnet_advanced(loaded.unet, loaded.links[0], hints[0], 0.7, 0.0, 1.0)
    unet = apply_controlnet_advanced(unet, loaded.links[1], hints[1], 0.4, 0.0, 1.0)
    _assert_same(loaded.our_picture(unet, noise), library, loaded.plain_picture())


def test_the_same_controlnet_twice_is_one_network_with_two_hints(loaded: Loaded) -> None:
    noise, hints = _noise(), [hint(seed=5), hint(seed=6)]
    library = loaded.library_picture(noise, hints, [loaded.controlnets[0]] * 2, controlnet_conditioning_scale=[0.5, 0.5])
    unet = loaded.unet
    for one in hints:
        unet = apply_controlnet_advanced(unet, loaded.links[0], one, 0.5, 0.0, 1.0)
    assert unet.controlnet_linked_list.get_models() == [loaded.links[0].get_models()[0]]
    _assert_same(loaded.our_picture(unet, noise), library, loaded.plain_picture())


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.34, 1.0), (0.34, 0.67)])
def test_from_one_step_to_another(loaded: Loaded, start: float, end: float) -> None:
    """Steps are at timesteps 999, 799.2 ... 0: step i is active here from fraction i/5 on, in the pipeline from (i + 1)/6 on and up to i/6."""
    noise, strength = _noise(), 10.0
    library = loaded.library_picture(
        noise, hint(), loaded.controlnets[0], control_guidance_start=start, control_guidance_end=end, controlnet_conditioning_scale=strength
    )
    active = [not (i / NUM_STEPS < start or (i + 1) / NUM_STEPS > end) for i in range(NUM_STEPS)]
    first, last = active.index(True), NUM_STEPS - 1 - active[::-1].index(True)
    ours_start, ours_end = max(0.0, (first - 0.5) / (NUM_STEPS - 1)), min(1.0, (last + 0.5) / (NUM_STEPS - 1))
    unet = apply_controlnet_advanced(loaded.unet, loaded.links[0], hint(), strength, ours_start, ours_end)
    ours = loaded.our_picture(unet, noise)
    _assert_same(ours, library, loaded.plain_picture())
    always = apply_controlnet_advanced(loaded.unet, loaded.links[0], hint(), strength, 0.0, 1.0)
    assert (ours - loaded.our_picture(always, noise)).abs().mean() > 0.5 * ONE_PIXEL_STEP


def test_for_the_positive_branch_alone_with_a_weight_per_layer(loaded: Loaded) -> None:
    """The pipelines' guess mode: scales from 0.1 to 1 over the residuals, nothing for the negative branch."""
    noise = _noise(2)
    library = loaded.library_picture(noise, hint(batch=2), loaded.controlnets[0], guess_mode=True)
    count = len(loaded.controlnets[0].controlnet_down_blocks)
    scales = torch.logspace(-1, 0, count + 1).tolist()
    weights = {"input": [], "middle": scales[-1:], "output": scales[:-1]}
    unet = apply_controlnet_advanced(
        loaded.unet, loaded.links[0], hint(batch=2), 1.0, 0.0, 1.0, positive_advanced_weighting=weights, negative_advanced_weighting=zero_weights()
    )
    _assert_same(loaded.our_picture(unet, noise), library, loaded.plain_picture(2))


def test_without_guidance(loaded: Loaded) -> None:
    noise = _noise()
    library = loaded.library_picture(noise, hint(), loaded.controlnets[0], cfg=1.0)
    unet = apply_controlnet_advanced(loaded.unet, loaded.links[0], hint(), 1.0, 0.0, 1.0)
    _assert_same(loaded.our_picture(unet, noise, cfg=1.0), library, loaded.plain_picture(cfg=1.0))


@pytest.mark.parametrize(("kind", "layout", "channels"), ADAPTERS)
def test_a_t2i_adapter(loaded: Loaded, tmp_path: Path, kind: str, layout: str, channels: int) -> None:
    is_sdxl = loaded.models.family == "sdxl"
    if loaded.models.family == "sd20" or (is_sdxl and kind == "light_adapter"):
        pytest.skip("there are no such adapters")
    kind = "full_adapter_xl" if is_sdxl else kind
    adapter = build_adapter(loaded.models, kind, channels=channels)
    link = load_controlnet(write_adapter(tmp_path / "adapter.safetensors", adapter, layout=layout))
    noise, picture = _noise(2), hint()[:, :channels]
    library = loaded.library_picture(noise, picture.expand(2, -1, -1, -1), adapter, is_adapter=True, adapter_conditioning_scale=0.8)
    unet = apply_controlnet_advanced(loaded.unet, link, picture, 0.8, 0.0, 1.0)
    _assert_same(loaded.our_picture(unet, noise), library, loaded.plain_picture(2))
    both = apply_controlnet_advanced(unet, loaded.links[0], hint(), 1.0, 0.0, 1.0)
    assert (loaded.our_picture(both, noise) - library).abs().mean() > 0.5 * ONE_PIXEL_STEP, "together with a ControlNet"


def test_a_t2i_adapter_of_another_family_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    other = build_models(Path("none"), "sdxl" if loaded.models.family != "sdxl" else "sd15")
    kind = "full_adapter_xl" if other.family == "sdxl" else "full_adapter"
    link = load_controlnet(write_adapter(tmp_path / "wrong.safetensors", build_adapter(other, kind), layout="ldm"))
    with pytest.raises(ControlNetError, match=r"wrong\.safetensors does not fit"):
        apply_controlnet_advanced(loaded.unet, link, hint(), 1.0, 0.0, 1.0)


def test_a_controlnet_of_another_family_is_refused_with_both_families(loaded: Loaded, tmp_path: Path) -> None:
    other = "sdxl" if loaded.models.family != "sdxl" else "sd15"
    models = write_checkpoint(tmp_path / "other.safetensors", other)
    link = load_controlnet(write_controlnet(tmp_path / "wrong.safetensors", build_controlnet(models)))
    with pytest.raises(ControlNetError, match=r"wrong\.safetensors does not fit.*SDXL"):
        apply_controlnet_advanced(loaded.unet, link, hint(), 1.0, 0.0, 1.0)
