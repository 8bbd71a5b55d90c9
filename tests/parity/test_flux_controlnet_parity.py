"""Pictures with ControlNets for Flux.1 against diffusers' FluxControlNetPipeline, and the same over several slots."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxControlNetPipeline, FluxMultiControlNetModel, FluxPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from backend import memory_management
from backend.args import BackendConfig
from backend.checkpoint_file import CheckpointError
from backend.controlnet_loader import load_controlnet
from backend.devices.probing import probe_devices
from backend.diffusion_engine.base import ForgeDiffusionEngine
from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.nn.controlnet import ControlNetwork
from backend.nn.controlnet_union import UNION_TYPES
from backend.nn.flux_controlnet import FluxControlNetwork, spread_residuals
from backend.parallel.placing.fleet import current_fleet
from backend.parallel.running import status
from backend.parallel.running.session import SamplingRequest
from backend.patcher.controlnet import ControlNet, ControlNetError, apply_controlnet_advanced
from backend.patcher.flux_controlnet import FluxControlNet
from backend.patcher.latent_controlnet import SOFT_WEIGHT, even_weights
from backend.patcher.unet import UnetPatcher
from backend.sampling.sampling_function import denoise_guided, sampling_cleanup, sampling_prepare
from tests.backend.families.test_flux_split import SHAPE, make_inputs, make_patcher
from tests.parity.test_flux_parity import load, pack
from tests.support.checkpoints import build_models
from tests.support.controlnets import build_controlnet
from tests.support.fleets import virtual_fleet
from tests.support.flow_pictures import ONE_PIXEL_STEP, SIDE, Prompts, check_same, make_scheduler, our_picture, shifted_sigmas
from tests.support.flux_checkpoints import FluxFiles
from tests.support.flux_controlnets import KINDS, make_controlnet, write_flux_controlnet, xlabs_tensors

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")

MODE = 2
"""Depth, of a Union's kinds; control type 1 of the panel."""
DEPTH_TYPE = 1


@pytest.fixture(autouse=True)
def _cpu_engine() -> Iterator[None]:
    memory_management.configure(BackendConfig(), probe_devices(BackendConfig(device_ids=("cpu",))))
    yield
    memory_management.unload_all_models()


def hint(seed: int = 6) -> Tensor:
    return torch.rand(1, 3, 8 * SIDE, 8 * SIDE, generator=torch.Generator().manual_seed(seed))


def noise(rows: int = 1) -> Tensor:
    return torch.randn(rows, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def encode(files: FluxFiles, picture: Tensor) -> Tensor:
    with torch.no_grad():
        return (files.vae.encode(picture * 2 - 1).latent_dist.mode() - 0.1159) * 0.3611  # type: ignore[no-any-return]


def make_link(folder: Path, kind: str, controlnet: Any, encoder: Any, prefix: str = "") -> FluxControlNet:
    link = load_controlnet(write_flux_controlnet(folder / f"{kind}.safetensors", controlnet, kind, prefix))
    assert isinstance(link, FluxControlNet) and link.num_types == (7 if kind == "Union" else 0)
    link.encode_hint = encoder
    return link.of_type(DEPTH_TYPE) if kind == "Union" else link


def library_picture(files: FluxFiles, controlnet: Any, text: dict[str, Tensor], sigmas: Tensor, start: Tensor, **fields: Any) -> Tensor:
    pipeline = FluxControlNetPipeline(
        scheduler=make_scheduler("Euler", sigmas), vae=files.vae, transformer=files.flux, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, controlnet=controlnet,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(  # type: ignore[no-any-return]
        prompt_embeds=text["crossattn"], pooled_prompt_embeds=text["vector"], guidance_scale=3.5, output_type="pt", latents=pack(start),
        height=8 * SIDE, width=8 * SIDE, sigmas=sigmas[:-1].tolist(), num_inference_steps=len(sigmas) - 1, **fields,
    ).images  # fmt: skip


def with_link(engine: ForgeDiffusionEngine, link: FluxControlNet, picture: Tensor, strength: float = 0.7, **settings: Any) -> None:
    engine.forge_objects.unet = apply_controlnet_advanced(engine.forge_objects.unet, link, picture, strength, 0.0, 1.0, **settings)


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_controlnet_is_the_pipeline_s(tmp_path: Path, kind: str) -> None:
    files, engine = load(tmp_path)
    text = engine.get_learned_conditioning(Prompts(["a red cat"]))
    assert isinstance(text, dict)
    controlnet, sigmas = make_controlnet(kind), shifted_sigmas(engine)
    mode = {"control_mode": MODE} if kind == "Union" else {}
    picture = hint()
    library = library_picture(files, controlnet, text, sigmas, noise(), control_image=picture * 2 - 1, controlnet_conditioning_scale=0.7, **mode)
    link = make_link(tmp_path, kind, controlnet, lambda pixels: encode(files, pixels), "controlnet." if kind == "InstantX" else "")
    without = our_picture(engine, "Euler", sigmas, noise(), text)
    with_link(engine, link, picture)
    ours = our_picture(engine, "Euler", sigmas, noise(), text)
    check_same(ours, library)
    assert (ours - without).abs().mean() > ONE_PIXEL_STEP


def test_two_controlnets_and_two_pictures_are_the_pipeline_s(tmp_path: Path) -> None:
    """One after the other in the chain. (With true CFG the library gives the negative branch the positive one's residuals; we compute its own.)"""
    files, engine = load(tmp_path)
    text = engine.get_learned_conditioning(Prompts(["a red cat", "a green dog"]))
    assert isinstance(text, dict)
    controlnets, hints, sigmas = [make_controlnet("InstantX", seed) for seed in (5, 6)], [hint(6), hint(7)], shifted_sigmas(engine)
    library = library_picture(
        files, FluxMultiControlNetModel(controlnets), text, sigmas, noise(2), control_image=[one * 2 - 1 for one in hints],
        controlnet_conditioning_scale=[0.7, 0.4],
    )  # fmt: skip
    for controlnet, picture, strength in zip(controlnets, hints, (0.7, 0.4)):
        with_link(engine, make_link(tmp_path, "InstantX", controlnet, lambda pixels: encode(files, pixels)), picture, strength)
    check_same(our_picture(engine, "Euler", sigmas, noise(2), text), library)


def test_inpainting_reads_a_mask_behind_the_latents(tmp_path: Path) -> None:
    """alimama's network is the library's with a wider embedder of the hint; the library has no pipeline for it. Its hint: the latents of the picture
    with black in the hole, and 1 where the picture is given."""
    files, engine = load(tmp_path)
    text = engine.get_learned_conditioning(Prompts(["a red cat"]))
    assert isinstance(text, dict)
    library, generator = make_controlnet("InstantX", seed=9), torch.Generator().manual_seed(9)
    library = copy.deepcopy(library)
    library.controlnet_x_embedder = nn.Linear(68, 48)
    library.controlnet_x_embedder.weight.data = torch.randn(48, 68, generator=generator) * 0.15
    library.requires_grad_(False)
    link = make_link(tmp_path, "InstantX", library, lambda pixels: encode(files, pixels))
    hole, picture = torch.zeros(1, 1, 8 * SIDE, 8 * SIDE), hint()
    hole[..., 16:40, 8:24] = 1.0
    with pytest.raises(ControlNetError, match="is for inpainting, but its hint has no part to fill"):
        link.set_cond_hint(picture)
    link.set_cond_hint(torch.where(hole > 0, -1.0, picture))
    assert link.cond_hint is not None
    given = torch.ones(1, 1, SIDE, SIDE)
    given[..., 2:5, 1:3] = 0.0
    wanted = torch.cat([encode(files, picture * (1 - hole)), given], dim=1)
    torch.testing.assert_close(link.cond_hint, wanted)
    ids = FluxPipeline._prepare_latent_image_ids(1, SIDE // 2, SIDE // 2, "cpu", torch.float32)
    doubles, singles = library(
        pack(noise()), pack(wanted), encoder_hidden_states=text["crossattn"], pooled_projections=text["vector"], timestep=torch.tensor([0.7]),
        img_ids=ids, txt_ids=torch.zeros(text["crossattn"].shape[1], 3), guidance=torch.tensor([3.5]), return_dict=False,
    )  # fmt: skip
    found = link.control_model(
        noise(), wanted, torch.tensor([0.7]), text["crossattn"], y=text["vector"], guidance=torch.tensor([3.5])
    )  # fmt: skip
    for ours, theirs in zip(found, [*doubles, *singles], strict=True):
        torch.testing.assert_close(ours.flatten(2).transpose(1, 2), theirs, atol=1e-5, rtol=1e-4)
    assert link.control_model.make_empty().model.controlnet_x_embedder.in_features == 68
    with_link(engine, link, torch.where(hole > 0, -1.0, picture))
    our_picture(engine, "Euler", shifted_sigmas(engine), noise(), text)


def test_files_of_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    tensors = dict(make_controlnet("InstantX").state_dict())
    save_file({**tensors, "controlnet_x_embedder.weight": torch.zeros(48, 144)}, tmp_path / "fill.safetensors")
    with pytest.raises(CheckpointError, match=r"fill\.safetensors.*144 per token of the hint.*Supported are 64 of both .* and 68 of the hint"):
        load_controlnet(tmp_path / "fill.safetensors")
    del tensors["context_embedder.weight"]
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"part\.safetensors.*lacks context_embedder\.weight"):
        load_controlnet(tmp_path / "part.safetensors")
    xlabs = {key: tensor.contiguous() for key, tensor in xlabs_tensors(make_controlnet("XLabs")).items()}
    save_file({**xlabs, "input_hint_block.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"odd\.safetensors.*unknown way"):
        load_controlnet(tmp_path / "odd.safetensors")


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    link = make_link(tmp_path, "InstantX", make_controlnet("InstantX"), None)
    with pytest.raises(ControlNetError, match="no VAE was given"):
        link.set_cond_hint(hint())
    union = make_link(tmp_path, "Union", make_controlnet("Union"), lambda pixels: noise())
    with pytest.raises(ControlNetError, match=r"does not support Segmentation hints\. Use one of OpenPose, Depth"):
        union.of_type(UNION_TYPES.index("Segmentation"))
    with pytest.raises(ControlNetError, match=r"for Flux\.1, but the checkpoint in use is not"):
        apply_controlnet_advanced(make_unet(), union, hint(), 1.0, 0.0, 1.0)
    unet_link = ControlNet(ControlNetwork(build_controlnet(build_models(Path("none"), "sd15"))))
    with pytest.raises(ControlNetError, match=r"features 64 wide, but the checkpoint in use is no UNet"):
        apply_controlnet_advanced(make_patcher(), unet_link, hint(), 1.0, 0.0, 1.0)


def make_unet() -> UnetPatcher:
    return UnetPatcher(KModel(build_models(Path("none"), "sd15").unet, Prediction()), torch.device("cpu"), torch.device("cpu"))


# several slots


def guided(strategy: str, kinds: tuple[str, ...], **settings: Any) -> Tensor:
    """Two pictures with CFG on the current slots."""
    fleet = current_fleet()
    home, rows = fleet.primary.torch_device, SHAPE[0]
    unet = make_patcher(fleet)
    for kind in kinds:
        link = FluxControlNet(FluxControlNetwork(make_controlnet(kind)))
        link.encode_hint = lambda pixels: functional.avg_pool2d(pixels.repeat(1, 6, 1, 1)[:, :16], 8)
        link.name = kind
        unet = apply_controlnet_advanced(unet, link.of_type(DEPTH_TYPE) if kind == "Union" else link, hint(), 0.8, 0.0, 1.0, **settings)
    inputs, generator = make_inputs(home), torch.Generator().manual_seed(8)
    text = {"crossattn": inputs["c_crossattn"], "vector": inputs["y"], "guidance": inputs["guidance"]}
    other = {**text, "crossattn": torch.randn(text["crossattn"].shape, generator=generator).to(home)}
    sampling_prepare(unet, inputs["x"], SamplingRequest(images=rows, branches=2, strategy=strategy))  # type: ignore[arg-type]
    denoised = denoise_guided(unet, inputs["x"], inputs["t"], text_cond=text, text_uncond=other, cond_scale=3.0, text_repeats=False)[0].cpu()
    sampling_cleanup(unet)
    return denoised


WEIGHED: dict[str, Any] = {
    "advanced_mask_weighting": torch.linspace(0, 1, 64).view(1, 1, 8, 8),
    "positive_advanced_weighting": even_weights(SOFT_WEIGHT),
    "negative_advanced_weighting": even_weights(0.0),
}
SLOT_CASES = [
    *(("layers", 2, ("InstantX", "XLabs")), ("layers", 3, ("Union",)), ("replicas", 2, ("InstantX", "XLabs")), ("single", 2, ("Union",))),
    *(("tiles", 2, ("InstantX", "XLabs")), ("tiles", 3, ("Union",))),
]


@pytest.mark.parametrize(("strategy", "slots", "kinds"), SLOT_CASES)
@pytest.mark.parametrize("settings", [{}, WEIGHED], ids=["plain", "weighed"])
def test_slots_give_what_one_slot_gives(strategy: str, slots: int, kinds: tuple[str, ...], settings: dict[str, Any]) -> None:
    with virtual_fleet(1):
        wanted = guided("auto", kinds, **settings)
        assert (wanted - guided("auto", ())).abs().mean() > 0.01
    with virtual_fleet(slots):
        found = guided(strategy, kinds, **settings)
        plan = status.current_plan()
    assert plan is not None and plan.strategy == strategy
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-5)


def test_a_residual_that_a_slot_adds_in_several_places_crosses_once() -> None:
    """XLabs' two residuals repeat along the double blocks; of InstantX's singles one serves two blocks."""
    with virtual_fleet(2) as fleet:
        unet = make_patcher(fleet)
        link = FluxControlNet(FluxControlNetwork(make_controlnet("InstantX")))
        link.encode_hint = lambda pixels: functional.avg_pool2d(pixels.repeat(1, 6, 1, 1)[:, :16], 8)
        link.set_cond_hint(hint())
        link.pre_run(unet.model, lambda percent: 1.0 - percent)
        spread = link.spread(link.place([torch.zeros(1, 48, 4, 4) for _ in range(3)]))
    assert [len(spread[kind]) for kind in ("input", "output")] == [2, 3]
    assert spread["input"][0] is spread["input"][1] and spread["output"][0] is spread["output"][1] is not spread["output"][2]
    assert spread_residuals([1, 2], 5, repeats=True) == [1, 2, 1, 2, 1] and spread_residuals([1, 2], 5, repeats=False) == [1, 1, 1, 2, 2]  # type: ignore[list-item,comparison-overlap]
