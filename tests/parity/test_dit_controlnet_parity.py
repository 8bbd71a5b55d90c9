"""Pictures with ControlNets for SD3 and Z-Image against diffusers' pipelines, and the same over several slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    ZImageControlNetInpaintPipeline,
    ZImageControlNetPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.nn import functional

from backend.checkpoint_file import CheckpointError
from backend.controlnet_loader import load_controlnet
from backend.families.sd3 import FAMILY as SD3
from backend.families.zimage import FAMILY as ZIMAGE
from backend.modules.k_model import KModel
from backend.parallel.placing.fleet import Fleet, current_fleet
from backend.parallel.running import status
from backend.parallel.running.session import SamplingRequest
from backend.patcher.controlnet import ControlNetError, apply_controlnet_advanced
from backend.patcher.latent_controlnet import HintEncoder, even_weights
from backend.patcher.unet import UnetPatcher
from backend.sampling.sampling_function import denoise_guided, sampling_cleanup, sampling_prepare
from tests.parity import test_sd3_parity, test_zimage_parity
from tests.support.dit_checkpoints import DitFiles
from tests.support.dit_controlnets import (
    LARGE,
    fused_tensors,
    make_sd3_controlnet,
    make_zimage_controlnet,
    stability_tensors,
    write_controlnet,
)
from tests.support.fleets import virtual_fleet
from tests.support.flow_pictures import ONE_PIXEL_STEP, SIDE, check_same, cpu_engine, load, make_scheduler, our_picture, shifted_sigmas
from tests.support.sd3_networks import CONFIG, make_sd3, write_sd3
from tests.support.zimage_networks import TEXT_WIDTH, make_zimage, qwen_tokenizer, write_zimage

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")
CFG, STRENGTH = 3.0, 0.7
NOISE = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
HINT = torch.rand(1, 3, 8 * SIDE, 8 * SIDE, generator=torch.Generator().manual_seed(6))
HOLE = (torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(7)) > 0.6).float().repeat_interleave(16, 2).repeat_interleave(16, 3)
"""1 where a hint for inpainting is to be filled."""


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pipelines draw latents of a hint at random; we take the middle."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    with cpu_engine():
        yield


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def zimage(tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_zimage(tmp_path_factory.mktemp("zimage"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> DitFiles:
    return write_sd3(tmp_path_factory.mktemp("large"), **LARGE)


def our_guided_picture(files: DitFiles, encode: Any, path: Path | None, hint: Tensor, **settings: Any) -> Tensor:
    """With a ControlNet, or without one."""
    engine = load(files.checkpoint, files.modules)
    texts = encode(engine)
    if path is not None:
        link: Any = load_controlnet(path)
        link = link.with_encoder(lambda pixels: engine.encode_first_stage(pixels * 2 - 1))
        engine.forge_objects.unet = apply_controlnet_advanced(engine.forge_objects.unet, link, hint, STRENGTH, 0.0, 1.0, **settings)
    return our_picture(engine, "Euler", shifted_sigmas(engine), NOISE, texts[0], cfg=CFG, uncond=texts[1])


def check_guided(files: DitFiles, encode: Any, path: Path, library: Tensor, hint: Tensor = HINT) -> None:
    check_same(our_guided_picture(files, encode, path, hint), library)
    without = our_guided_picture(files, encode, None, hint)
    assert (library - without).abs().mean() > ONE_PIXEL_STEP


# SD3


def sd3_picture(files: DitFiles, kind: Any, controlnet: Any, **fields: Any) -> Tensor:
    engine = load(files.checkpoint, files.modules)
    sigmas = shifted_sigmas(engine)

    def make(**parts: Any) -> Any:
        return kind(controlnet=controlnet, **parts)

    pipeline = test_sd3_parity.make_pipeline(files, make, make_scheduler("Euler", sigmas))
    return pipeline(  # type: ignore[no-any-return]
        test_sd3_parity.PROMPT, negative_prompt=test_sd3_parity.NEGATIVE, guidance_scale=CFG, output_type="pt", latents=NOISE, height=8 * SIDE,
        width=8 * SIDE, sigmas=sigmas[:-1].tolist(), num_inference_steps=len(sigmas) - 1, controlnet_conditioning_scale=STRENGTH, **fields,
    ).images  # fmt: skip


def test_instantx_is_the_pipeline_s(sd3: DitFiles, tmp_path: Path) -> None:
    """Three blocks get two residuals; the pooled text is zeros, and the latents of the hint are not centered."""
    controlnet = make_sd3_controlnet("InstantX")
    library = sd3_picture(sd3, StableDiffusion3ControlNetPipeline, controlnet, control_image=HINT * 2 - 1)
    path = write_controlnet(tmp_path / "pose.safetensors", controlnet.state_dict(), "controlnet.")
    check_guided(sd3, test_sd3_parity.encode, path, library)


def test_inpainting_is_the_pipeline_s(sd3: DitFiles, tmp_path: Path) -> None:
    controlnet = make_sd3_controlnet("inpainting")
    fields = {"control_image": HINT * 2 - 1, "control_mask": HOLE}
    library = sd3_picture(sd3, StableDiffusion3ControlNetInpaintingPipeline, controlnet, **fields)
    path = write_controlnet(tmp_path / "inpaint.safetensors", controlnet.state_dict())
    check_guided(sd3, test_sd3_parity.encode, path, library, torch.where(HOLE > 0.5, -1.0, HINT))
    with pytest.raises(ControlNetError, match=r"inpaint\.safetensors is for inpainting, but its hint has no part to fill"):
        our_guided_picture(sd3, test_sd3_parity.encode, path, HINT)


@pytest.mark.parametrize(("layout", "control_type"), [("own", 2), ("own", 1), ("diffusers", 0)])
def test_stability_s_is_the_pipeline_s(large: DitFiles, tmp_path: Path, layout: str, control_type: int) -> None:
    """For edges the VAE gets 127.5 p + 0.5 of a hint's levels p."""
    controlnet = make_sd3_controlnet("Stability")
    pixels = HINT * 127.5 + 0.5 if control_type == 1 else HINT * 2 - 1
    library = sd3_picture(large, StableDiffusion3ControlNetPipeline, make_sd3_controlnet("Stability"), control_image=pixels)
    tensors = stability_tensors(controlnet, control_type) if layout == "own" else controlnet.state_dict()
    path = write_controlnet(tmp_path / "large.safetensors", tensors)
    check_guided(large, test_sd3_parity.encode, path, library)


def test_files_of_stability_in_diffusers_names_say_edges_by_their_own_name(tmp_path: Path) -> None:
    tensors = make_sd3_controlnet("Stability").state_dict()
    for name, is_canny in (("sd35_large_canny", True), ("sd35_large_depth", False)):
        link: Any = load_controlnet(write_controlnet(tmp_path / f"{name}.safetensors", tensors))
        assert link.copy_for(make_model("SD 3", **LARGE)).is_canny is is_canny


# Z-Image


def zimage_picture(files: DitFiles, kind: Any, controlnet: Any, **fields: Any) -> Tensor:
    engine = load(files.checkpoint, files.modules)
    sigmas, tokenizer = shifted_sigmas(engine), qwen_tokenizer()
    tokenizer.chat_template = test_zimage_parity.TEMPLATE
    pipeline = kind(
        scheduler=make_scheduler("Euler", sigmas), vae=files.vae, transformer=files.transformer, text_encoder=files.texts["qwen3"],
        tokenizer=tokenizer, controlnet=controlnet,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(  # type: ignore[no-any-return]
        test_zimage_parity.PROMPT, negative_prompt=test_zimage_parity.NEGATIVE, guidance_scale=CFG - 1, output_type="pt", latents=NOISE,
        height=8 * SIDE, width=8 * SIDE, sigmas=sigmas[:-1].tolist(), num_inference_steps=len(sigmas) - 1,
        controlnet_conditioning_scale=STRENGTH, **fields,
    ).images  # fmt: skip


@pytest.mark.parametrize(("kind", "num_layers"), [("1.0", 1), ("1.0", 3), ("2.0", 3), ("2.1", 3)])
def test_zimage_unions_are_the_pipeline_s(zimage: DitFiles, tmp_path: Path, kind: str, num_layers: int) -> None:
    """Prompt and negative prompt have unlike lengths and run in one call."""
    controlnet = make_zimage_controlnet(kind, num_layers)
    library = zimage_picture(zimage, ZImageControlNetPipeline, controlnet, control_image=HINT * 2 - 1)
    tensors = fused_tensors(controlnet) if kind == "1.0" else controlnet.state_dict()
    path = write_controlnet(tmp_path / "union.safetensors", tensors)
    check_guided(zimage, test_zimage_parity.encode, path, library)


def test_zimage_unions_inpaint(zimage: DitFiles, tmp_path: Path) -> None:
    """The pipeline takes a map beside the picture; ours is a picture alone, so the library's map is latents of zeros."""
    controlnet = make_zimage_controlnet("2.1")
    middle = zimage.vae.config.shift_factor
    path = write_controlnet(tmp_path / "union.safetensors", controlnet.state_dict())
    hint = torch.where(HOLE > 0.5, -1.0, HINT)
    with pytest.MonkeyPatch.context() as patch:
        encode, calls = zimage.vae.encode, []

        def first_is_nothing(pixels: Tensor) -> Any:
            calls.append(pixels)
            found = encode(pixels)
            if len(calls) == 1:
                found.latent_dist.mean.fill_(middle)
            return found

        patch.setattr(zimage.vae, "encode", first_is_nothing)
        library = zimage_picture(zimage, ZImageControlNetInpaintPipeline, controlnet, image=HINT * 2 - 1, mask_image=HOLE, control_image=HINT * 2 - 1)
        assert len(calls) == 2
    check_guided(zimage, test_zimage_parity.encode, path, library, hint)


# what does not fit


def make_model(family: str, **changes: Any) -> KModel:
    return make_unet(family, None, **changes).model


def make_unet(family: str, fleet: Fleet | None, **changes: Any) -> UnetPatcher:
    facts, make = {"SD 3": (SD3, make_sd3), "Z-Image": (ZIMAGE, make_zimage)}[family]
    whole: Any = make(**changes)
    found: Any = type("Found", (), {"config": {name: value for name, value in whole.config.items() if not name.startswith("_")}})
    for name in ("sample_size", "all_patch_size", "all_f_patch_size", "qk_norm", "siglip_feat_dim", "axes_lens"):
        if family == "Z-Image" or name == "sample_size":
            found.config.pop(name, None)
    with torch.device("meta"):
        network: Any = facts.build_denoiser(found)
    tensors = dict(whole.state_dict())
    tensors |= {f"pads.{ours}": tensors.pop(theirs) for ours, theirs in (("picture", "x_pad_token"), ("text", "cap_pad_token")) if theirs in tensors}
    network.load_state_dict(tensors, assign=True)
    predictor = facts.make_predictor(facts.find_prediction(None, found, network))  # type: ignore[arg-type]
    model = KModel(network.eval().requires_grad_(False), predictor, build_program=facts.build_program, key_map=facts.key_map(network))
    cpu = torch.device("cpu")
    return UnetPatcher(model, cpu if fleet is None else fleet.primary.torch_device, cpu)


def test_other_families_and_widths_are_refused_by_name(tmp_path: Path) -> None:
    instantx = write_controlnet(tmp_path / "instantx.safetensors", make_sd3_controlnet("InstantX").state_dict())
    large = write_controlnet(tmp_path / "large.safetensors", make_sd3_controlnet("Stability").state_dict())
    union = write_controlnet(tmp_path / "union.safetensors", make_zimage_controlnet("1.0").state_dict())
    for path, family, changes, message in (
        (instantx, "Z-Image", {}, r"instantx\.safetensors is a ControlNet for SD 3, but the checkpoint in use is not"),
        (instantx, "SD 3", {"qk_norm": None}, r"instantx\.safetensors does not fit .* norms of queries and keys are rms_norm, the checkpoint's None"),
        (large, "Z-Image", {}, r"large\.safetensors is a ControlNet for SD 3, but the checkpoint in use is not"),
        (large, "SD 3", {}, r"large\.safetensors does not fit .* 64 wide, the checkpoint's 32"),
        (union, "SD 3", {}, r"union\.safetensors is a ControlNet for Z-Image, but the checkpoint in use is not"),
        (union, "Z-Image", {"n_layers": 2}, r"union\.safetensors does not fit .* residuals for 3 layers, and the checkpoint has 2"),
    ):
        link: Any = load_controlnet(path)
        link = link.with_encoder(lambda pixels: NOISE)
        with pytest.raises(ControlNetError, match=message):
            apply_controlnet_advanced(make_unet(family, None, **changes), link, HINT, 1.0, 0.0, 1.0)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    sd3_tensors, union = dict(make_sd3_controlnet("InstantX").state_dict()), dict(make_zimage_controlnet("1.0").state_dict())
    width = sd3_tensors["pos_embed_input.proj.weight"].shape[0]
    for tensors, message in (
        ({**sd3_tensors, "pos_embed_input.proj.weight": torch.zeros(width, 20, 2, 2)}, "20 channels of the hint"),
        ({**sd3_tensors, "pos_embed.pos_embed": torch.zeros(1, 143, width)}, "143 positions"),
        ({key: one for key, one in sd3_tensors.items() if key != "transformer_blocks.1.ff.net.2.bias"}, r"lacks 1 of \d+ tensors"),
        ({**union, "control_all_x_embedder.2-1.weight": torch.zeros(48, 68)}, "68 inputs per token of the hint"),
        ({key: one for key, one in union.items() if key != "control_layers.0.before_proj.bias"}, r"lacks 1 of \d+ tensors"),
    ):
        path = write_controlnet(tmp_path / "damaged.safetensors", tensors)
        with pytest.raises(CheckpointError, match=rf"damaged\.safetensors.*{message}"):
            load_controlnet(path)


def test_layers_of_another_checkpoint_are_borrowed_anew(tmp_path: Path) -> None:
    """And the same checkpoint's only once."""
    link: Any = load_controlnet(write_controlnet(tmp_path / "union.safetensors", make_zimage_controlnet("1.0").state_dict()))
    one, other = make_model("Z-Image"), make_model("Z-Image", seed=1)
    first = link.copy_for(one)
    assert link.copy_for(one).control_model is first.control_model
    second = link.copy_for(other)
    for model, front in ((one, first.control_model.front), (other, second.control_model.front)):
        wanted = {key.removeprefix("diffusion_model."): tensor for key, tensor in model.state_dict().items()}
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in front.state_dict().items())
    own = [dict(link.control_model.model.state_dict()) for link in (first, second)]
    assert own[0].keys() == own[1].keys() and all(torch.equal(own[0][key], own[1][key]) for key in own[0])


# several slots


def text_of(family: str, home: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(8)
    width = CONFIG["joint_attention_dim"] if family == "SD 3" else TEXT_WIDTH
    extra: dict[str, Tensor] = (
        {"vector": torch.randn(2, CONFIG["pooled_projection_dim"], generator=generator)}
        if family == "SD 3"
        else {"text_lengths": torch.tensor([40, 7])}
    )
    texts = [{"crossattn": torch.randn(2, 40, width, generator=generator), **extra} for _ in range(2)]
    return {name: one.to(home) for name, one in texts[0].items()}, {name: one.to(home) for name, one in texts[1].items()}


def guided(family: str, strategy: str, path: Path | None, settings: Mapping[str, Any], changes: Mapping[str, Any]) -> Tensor:
    """Two pictures with CFG on the current slots. `changes`: to the tiny denoiser."""
    fleet = current_fleet()
    home = fleet.primary.torch_device
    unet = make_unet(family, fleet, **changes)
    if path is not None:
        link = load_controlnet(path)
        assert isinstance(link, HintEncoder)
        link = link.with_encoder(lambda pixels: functional.avg_pool2d(pixels.repeat(1, 6, 1, 1)[:, :16], 8))
        unet = apply_controlnet_advanced(unet, link, HINT, 0.8, 0.0, 1.0, **settings)
    x = torch.randn(2, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(5)).to(home)
    cond, uncond = text_of(family, home)
    sampling_prepare(unet, x, SamplingRequest(images=2, branches=2, strategy=strategy))  # type: ignore[arg-type]
    sigma = torch.full((2,), 0.7, device=home)
    denoised = denoise_guided(unet, x, sigma, text_cond=cond, text_uncond=uncond, cond_scale=3.0, text_repeats=False)[0].cpu()
    sampling_cleanup(unet)
    return denoised


WEIGHED = {
    "advanced_mask_weighting": torch.linspace(0, 1, 64).view(1, 1, 8, 8),
    "positive_advanced_weighting": even_weights(0.5),
    "negative_advanced_weighting": even_weights(0.0),
}
SLOT_CASES = [
    ("SD 3", "InstantX", "layers", 2), ("SD 3", "Stability", "replicas", 2), ("SD 3", "Stability", "single", 2), ("Z-Image", "2.1", "layers", 3),
    ("Z-Image", "1.0", "replicas", 2), ("Z-Image", "2.0", "single", 2), ("SD 3", "InstantX", "tiles", 2),
]  # fmt: skip


@pytest.mark.parametrize(("family", "kind", "strategy", "slots"), SLOT_CASES)
@pytest.mark.parametrize("settings", [{}, WEIGHED], ids=["plain", "weighed"])
def test_slots_give_what_one_slot_gives(tmp_path: Path, family: str, kind: str, strategy: str, slots: int, settings: dict[str, Any]) -> None:
    controlnet = make_sd3_controlnet(kind) if family == "SD 3" else make_zimage_controlnet(kind)
    path, changes = write_controlnet(tmp_path / "control.safetensors", controlnet.state_dict()), LARGE if kind == "Stability" else {}
    with virtual_fleet(1):
        wanted = guided(family, "auto", path, settings, changes)
        assert (wanted - guided(family, "auto", None, {}, changes)).abs().mean() > 0.01
    with virtual_fleet(slots):
        found = guided(family, strategy, path, settings, changes)
        plan = status.current_plan()
    assert plan is not None and plan.strategy == strategy
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-5)


def test_zimage_keeps_rows_whole_beside_a_controlnet(tmp_path: Path) -> None:
    """Its residuals go to the text too, which tiles share out."""
    path = write_controlnet(tmp_path / "control.safetensors", make_zimage_controlnet("2.1").state_dict())
    with virtual_fleet(1):
        wanted = guided("Z-Image", "auto", path, {}, {})
    with virtual_fleet(2):
        found = guided("Z-Image", "tiles", path, {}, {})
        plan = status.current_plan()
    assert plan is not None and plan.strategy != "tiles" and "belong to the text too" in plan.reason
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-5)
