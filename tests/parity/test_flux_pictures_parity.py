"""Pictures shown to Flux.1: Redux against FluxPriorReduxPipeline, XLabs' IP-Adapter against FluxPipeline's, and both over several slots."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxPriorReduxPipeline
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from backend import memory_management
from backend.args import BackendConfig
from backend.checkpoint_file import CheckpointError, open_tensor_file
from backend.clip_vision import load_clip_vision
from backend.devices.probing import probe_devices
from backend.flux_ip_adapter import apply_flux_ip_adapter, read_flux_ip_adapter
from backend.ip_adapter import IPAdapter
from backend.parallel.placing.fleet import current_fleet
from backend.parallel.running import status
from backend.parallel.running.session import SamplingRequest, find_bound_hook
from backend.patcher.controlnet import ControlNetError
from backend.patcher.unet import UnetPatcher
from backend.redux import Redux, apply_redux, read_redux
from backend.sampling.sampling_function import denoise_guided, sampling_cleanup, sampling_prepare
from backend.siglip_vision import load_siglip_vision
from modules_forge import shared
from modules_forge.supported_flux_pictures import FluxIPAdapterPatcher, ReduxPatcher, find_siglip
from tests.backend.families.test_flux_split import SHAPE, make_inputs, make_patcher
from tests.parity.test_dit_controlnet_parity import make_unet
from tests.parity.test_flux_parity import load, pack
from tests.support.fleets import virtual_fleet
from tests.support.flow_pictures import ONE_PIXEL_STEP, SIDE, Prompts, check_same, make_scheduler, our_picture, shifted_sigmas
from tests.support.flux_networks import CONFIG, WIDTH
from tests.support.flux_pictures import (
    SIGLIP_SIDE_PX,
    adapter_tables,
    make_redux,
    make_siglip,
    siglip_tensors,
    write,
    xlabs_tensors,
)
from tests.support.ip_adapters import SIDE_PX as TOWER_SIDE_PX
from tests.support.ip_adapters import build_tower, reference_picture, write_tower

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")
NOISE = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _cpu_engine() -> Iterator[None]:
    memory_management.configure(BackendConfig(), probe_devices(BackendConfig(device_ids=("cpu",))))
    yield
    memory_management.unload_all_models()


def read(path: Path, reader: Any) -> Any:
    with open_tensor_file(path) as file:
        return reader(file)


def library_pipeline(files: Any, flux: Any, sigmas: Tensor, **parts: Any) -> Any:
    pipeline = FluxPipeline(
        scheduler=make_scheduler("Euler", sigmas), vae=files.vae, transformer=flux, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, **parts,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_pipeline(pipeline: Any, text: Tensor, pooled: Tensor, sigmas: Tensor, **fields: Any) -> Tensor:
    return pipeline(  # type: ignore[no-any-return]
        prompt_embeds=text, pooled_prompt_embeds=pooled, guidance_scale=3.5, output_type="pt", latents=pack(NOISE), height=8 * SIDE, width=8 * SIDE,
        sigmas=sigmas[:-1].tolist(), num_inference_steps=len(sigmas) - 1, **fields,
    ).images  # fmt: skip


def conditions(engine: Any, *prompts: str) -> list[dict[str, Tensor]]:
    return [engine.get_learned_conditioning(Prompts([prompt])) for prompt in prompts]


# Redux


def test_redux_is_the_pipeline_s(tmp_path: Path) -> None:
    """Text of a prompt, then the picture's tokens. (With true CFG the pipeline wants a negative prompt of the same length; ours sees no picture.)"""
    files, engine = load(tmp_path)
    (text,) = conditions(engine, "a red cat")
    sigmas, siglip, redux, picture = shifted_sigmas(engine), make_siglip(), make_redux(), reference_picture()
    prior = FluxPriorReduxPipeline(
        image_encoder=siglip, image_embedder=redux, text_encoder=files.clip, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        feature_extractor=SiglipImageProcessorPil(size={"height": SIGLIP_SIDE_PX, "width": SIGLIP_SIDE_PX}),
    )  # fmt: skip
    shown = prior(picture, prompt_embeds=text["crossattn"].clone(), pooled_prompt_embeds=text["vector"].clone())
    assert shown.prompt_embeds.shape[1] == text["crossattn"].shape[1] + 9
    pipeline = library_pipeline(files, files.flux, sigmas)
    library = run_pipeline(pipeline, shown.prompt_embeds, shown.pooled_prompt_embeds, sigmas)

    tower = load_siglip_vision(write(tmp_path / "siglip.safetensors", siglip_tensors(siglip)))
    ours: Redux = read(write(tmp_path / "redux.safetensors", redux.state_dict()), read_redux)
    features = tower.encode_images([np.asarray(picture)])
    torch.testing.assert_close(features, prior.encode_image(picture, "cpu", 1), atol=1e-5, rtol=1e-5)
    without = our_picture(engine, "Euler", sigmas, NOISE, text)
    engine.forge_objects.unet = apply_redux(engine.forge_objects.unet, ours, ours.make_tokens(features))
    found = our_picture(engine, "Euler", sigmas, NOISE, text)
    check_same(found, library)
    assert (found - without).abs().mean() > 0.3 * ONE_PIXEL_STEP


def test_redux_has_a_weight_and_a_range() -> None:
    """Its tokens are multiplied, as by the pipeline's prompt_embeds_scale; outside the range the text is alone."""
    unet, redux = make_patcher(), Redux(make_redux(), "redux")
    tokens = torch.randn(1, 3, CONFIG["joint_attention_dim"], generator=torch.Generator().manual_seed(4))
    text = torch.randn(1, 5, CONFIG["joint_attention_dim"], generator=torch.Generator().manual_seed(5))

    def texts_at(sigma: float, **settings: Any) -> Tensor:
        seen = []
        patched = apply_redux(unet, redux, tokens, **settings)
        patched.set_model_unet_function_wrapper(lambda apply, call: seen.append(call["c"]["c_crossattn"]) or call["input"])
        cond = {"crossattn": text, "vector": torch.zeros(1, CONFIG["pooled_projection_dim"])}
        denoise_guided(patched, torch.zeros(1, 16, 4, 4), torch.tensor([sigma]), text_cond=cond, text_uncond=None, cond_scale=1.0, text_repeats=False)
        return seen[0]

    assert torch.equal(texts_at(0.9, weight=0.5), torch.cat([text, 0.5 * tokens], dim=1))
    assert torch.equal(texts_at(0.9, percent_range=(0.5, 1.0)), text) and torch.equal(texts_at(0.9, weight=0.0), text)
    assert texts_at(0.4, percent_range=(0.5, 1.0)).shape[1] == 8


def test_redux_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    redux: Redux = read(write(tmp_path / "redux.safetensors", make_redux(text_width=48).state_dict()), read_redux)
    with pytest.raises(ControlNetError, match=r"redux\.safetensors does not fit .* text 48 wide, and the checkpoint reads 32"):
        apply_redux(make_patcher(), redux, torch.zeros(1, 2, 48))
    with pytest.raises(ControlNetError, match=r"redux\.safetensors is Redux for Flux\.1, but the checkpoint in use is not"):
        apply_redux(make_unet("SD 3", None), redux, torch.zeros(1, 2, 48))
    tensors = make_redux().state_dict()
    for changes, message in (
        ({"redux_down.weight": torch.zeros(32, 64)}, "lacks|shapes"),
        ({"redux_up.weight": torch.zeros(64, 32)}, r"redux_up\.weight is \(64, 32\)"),
    ):
        with pytest.raises(CheckpointError, match=rf"damaged\.safetensors.*({message})"):
            read(write(tmp_path / "damaged.safetensors", {**tensors, **changes}), read_redux)
    patch = write(
        tmp_path / "siglip.safetensors", {**siglip_tensors(make_siglip()), "vision_model.embeddings.position_embedding.weight": torch.zeros(8, 32)}
    )
    with pytest.raises(CheckpointError, match=r"siglip\.safetensors.* 8 positions"):
        load_siglip_vision(patch)


def test_a_unit_finds_siglip_beside_other_files(tmp_path: Path) -> None:
    folders = shared.preprocessor_dir, shared.controlnet_dir, shared.diffusers_dir
    shared.configure_folders(controlnet_dir=tmp_path / "none" / "x", preprocessor_dir=tmp_path / "towers", diffusers_dir=tmp_path)
    try:
        unit = ReduxPatcher.try_build_from_state_dict(make_redux().state_dict(), "redux.safetensors")
        assert unit is not None and ReduxPatcher.try_build_from_state_dict({"x": torch.zeros(1)}, "x") is None
        with pytest.raises(ControlNetError, match=r"redux\.safetensors needs the image encoder SigLIP \(width 32\).*sigclip_vision_patch14_384"):
            find_siglip(unit.model_patcher)
        write_tower(tmp_path / "towers" / "clip.safetensors", build_tower())
        write(tmp_path / "towers" / "deep" / "siglip.safetensors", siglip_tensors(make_siglip()))
        engine = SimpleNamespace(forge_objects=SimpleNamespace(unet=make_patcher()))
        hint = SimpleNamespace(picture=np.asarray(reference_picture()))
        params = SimpleNamespace(hints=[hint, hint], features=None)
        unit.process_after_running_preprocessors(SimpleNamespace(sd_model=engine), params)
        unit.process_before_every_sampling(SimpleNamespace(sd_model=engine), None, None, params=params)
        (modifier,) = engine.forge_objects.unet.model_options["conditioning_modifiers"]
        assert modifier.tokens_NLD.shape == (2, 9, CONFIG["joint_attention_dim"])
    finally:
        shared.configure_folders(
            controlnet_dir=Path(folders[1]), preprocessor_dir=Path(folders[0]), diffusers_dir=Path(folders[2])
        )  # fmt: skip


# IP-Adapter


@pytest.mark.parametrize("names", ["XLabs", "diffusers"])
def test_ip_adapters_are_the_pipeline_s(tmp_path: Path, names: str) -> None:
    """With true CFG, whose negative side sees a black picture."""
    files, engine = load(tmp_path)
    text, negative = conditions(engine, "a red cat", "dark")
    sigmas, tower, tables, picture = shifted_sigmas(engine), build_tower(), adapter_tables(), reference_picture()
    pipeline = library_pipeline(
        files, copy.deepcopy(files.flux), sigmas, image_encoder=tower,
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": TOWER_SIDE_PX}, crop_size=TOWER_SIDE_PX),
    )  # fmt: skip
    pipeline.load_ip_adapter({name: dict(table) for name, table in tables.items()}, "")
    pipeline.set_ip_adapter_scale(0.7)
    true_cfg = {"negative_prompt_embeds": negative["crossattn"], "negative_pooled_prompt_embeds": negative["vector"], "true_cfg_scale": 2.0}
    library = run_pipeline(pipeline, text["crossattn"], text["vector"], sigmas, ip_adapter_image=picture, **true_cfg)

    tensors = xlabs_tensors(tables) if names == "XLabs" else {f"{table}.{key}": one for table, named in tables.items() for key, one in named.items()}
    adapter: IPAdapter = read(write(tmp_path / "ip.safetensors", tensors), read_flux_ip_adapter)
    ours = load_clip_vision(write_tower(tmp_path / "tower.safetensors", tower))
    features = ours.encode_images([np.zeros((4, 4, 3), dtype=np.uint8), np.asarray(picture)], hidden_states=False)[1:]
    without = our_picture(engine, "Euler", sigmas, NOISE, text, cfg=2.0, uncond=negative)
    plain = engine.forge_objects.unet
    engine.forge_objects.unet = apply_flux_ip_adapter(plain, adapter, features, weight=0.7)
    found = our_picture(engine, "Euler", sigmas, NOISE, text, cfg=2.0, uncond=negative)
    check_same(found, library)
    assert (found - without).abs().mean() > ONE_PIXEL_STEP
    assert find_bound_hook(engine.forge_objects.unet.model_options["transformer_options"]) is None, "every plan can live with it"
    engine.forge_objects.unet = plain
    assert torch.equal(our_picture(engine, "Euler", sigmas, NOISE, text, cfg=2.0, uncond=negative), without), "off again"


def make_adapter(**changes: Any) -> IPAdapter:
    unit = FluxIPAdapterPatcher.try_build_from_state_dict(xlabs_tensors(adapter_tables(**changes)), "ip.safetensors")
    assert unit is not None
    return unit.model_patcher


def test_ip_adapters_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    adapter = make_adapter(num_blocks=1)
    with pytest.raises(ControlNetError, match=r"ip\.safetensors does not fit .* for 1 blocks 48 wide, and the checkpoint has 2 of 48"):
        apply_flux_ip_adapter(make_patcher(), adapter, torch.zeros(2, 40))
    with pytest.raises(ControlNetError, match=r"ip\.safetensors is an IP-Adapter for Flux\.1, but the checkpoint in use is not"):
        apply_flux_ip_adapter(make_unet("SD 3", None), adapter, torch.zeros(2, 40))
    tensors = xlabs_tensors(adapter_tables())
    value = "double_blocks.1.processor.ip_adapter_double_stream_v_proj"
    for changed, message in (
        ({key: one for key, one in tensors.items() if key != f"{value}.bias"}, rf"lacks {value}\.bias"),
        ({**tensors, f"{value}.weight": torch.zeros(WIDTH, 33)}, "tokens 32 wide"),
        ({**tensors, "ip_adapter_proj_model.norm.weight": torch.zeros(33)}, "128 outputs of its projection for tokens 33 wide"),
    ):
        with pytest.raises(CheckpointError, match=rf"damaged\.safetensors.*{message}"):
            read(write(tmp_path / "damaged.safetensors", changed), read_flux_ip_adapter)
    instantx = {f"ip_adapter.{number}.to_k_ip.weight": torch.zeros(1) for number in range(2)} | {"image_proj.proj.2.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"x\.bin: is an IP-Adapter for Flux\.1 by InstantX, which is not supported"):
        FluxIPAdapterPatcher.try_build_from_state_dict(instantx, "x.bin")


# several slots


def guided(strategy: str, *, shows: bool, mask: Tensor | None = None, redux: bool = False) -> Tensor:
    """Two pictures with CFG on the current slots, each shown a picture of its own."""
    fleet = current_fleet()
    home = fleet.primary.torch_device
    unet: UnetPatcher = make_patcher(fleet)
    generator = torch.Generator().manual_seed(9)
    if shows:
        unet = apply_flux_ip_adapter(unet, make_adapter(), torch.randn(3, 40, generator=generator), weight=0.8, mask_B1HW=mask)
    if redux:
        unet = apply_redux(unet, Redux(make_redux(), "redux"), torch.randn(2, 9, CONFIG["joint_attention_dim"], generator=generator))
    inputs = make_inputs(home)
    text = {"crossattn": inputs["c_crossattn"], "vector": inputs["y"], "guidance": inputs["guidance"]}
    other = {**text, "crossattn": torch.randn(text["crossattn"].shape, generator=torch.Generator().manual_seed(8)).to(home)}
    sampling_prepare(unet, inputs["x"], SamplingRequest(images=SHAPE[0], branches=2, strategy=strategy))  # type: ignore[arg-type]
    denoised = denoise_guided(unet, inputs["x"], inputs["t"], text_cond=text, text_uncond=other, cond_scale=3.0, text_repeats=False)[0].cpu()
    sampling_cleanup(unet)
    return denoised


@pytest.mark.parametrize(("strategy", "slots"), [("layers", 3), ("replicas", 2), ("tiles", 2)])
def test_slots_give_what_one_slot_gives(strategy: str, slots: int) -> None:
    mask = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    with virtual_fleet(1):
        wanted = guided("auto", shows=True, mask=mask, redux=True)
        assert (wanted - guided("auto", shows=True, redux=True)).abs().mean() > 1e-3
        assert (wanted - guided("auto", shows=False, redux=True)).abs().mean() > 1e-2
        assert (wanted - guided("auto", shows=True, mask=mask)).abs().mean() > 1e-2
    with virtual_fleet(slots):
        found = guided(strategy, shows=True, mask=mask, redux=True)
        plan = status.current_plan()
    assert plan is not None and (plan.strategy == strategy or strategy == "tiles")
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-5)
