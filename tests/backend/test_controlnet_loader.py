"""ControlNet files: kind and family from the keys, both layouts against diffusers' converter and forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import save_file

from backend import memory_management
from backend.args import BackendConfig
from backend.checkpoint_file import CheckpointError
from backend.controlnet_loader import TensorsInMemory, build_control, load_controlnet
from backend.devices.probing import probe_devices
from backend.patcher.controlnet import ControlNet
from tests.support.checkpoints import ReferenceModels, build_models
from tests.support.controlnets import build_controlnet, hint, ldm_state_dict, write_controlnet

FAMILIES = ("sd15", "sd20", "sdxl")


@pytest.fixture(autouse=True)
def _cpu() -> None:
    memory_management.configure(BackendConfig(), probe_devices(BackendConfig(device_ids=("cpu",))))


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest) -> ReferenceModels:
    return build_models(Path("none"), request.param)


def _inputs(models: ReferenceModels) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    config = models.unet.config
    inputs: dict[str, Any] = {
        "x": torch.randn(2, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([400.0, 900.0]),
        "context": torch.randn(2, 7, config.cross_attention_dim, generator=generator),
    }
    if config.addition_embed_type is not None:
        pooled = torch.randn(2, 64, generator=generator)
        time_ids = torch.full((2, 6), 64.0)
        inputs["library"] = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
        inputs["y"] = torch.cat([pooled, models.unet.add_time_proj(time_ids.flatten()).reshape(2, -1)], dim=1)
    return inputs


def _assert_equal(link: ControlNet, controlnet: ControlNetModel, models: ReferenceModels) -> None:
    inputs = _inputs(models)
    extra = inputs.pop("library", {})
    ours = link.control_model(hint=hint(batch=2), **inputs)
    down, middle = controlnet(inputs["x"], inputs["timesteps"], inputs["context"], hint(batch=2), return_dict=False, **extra)
    assert len(ours) == len(down) + 1
    for one, other in zip(ours, [*down, middle]):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(("layout", "name"), [("ldm", "a.safetensors"), ("ldm", "a.pth"), ("diffusers", "b.safetensors")])
def test_a_file_gives_the_librarys_residuals(models: ReferenceModels, tmp_path: Path, layout: str, name: str) -> None:
    controlnet = build_controlnet(models)
    link = load_controlnet(write_controlnet(tmp_path / name, controlnet, layout=layout))
    assert isinstance(link, ControlNet)
    assert link.name == name
    _assert_equal(link, controlnet, models)


def test_a_file_without_a_prefix_and_a_state_dict_give_the_same_result(models: ReferenceModels) -> None:
    controlnet = build_controlnet(models)
    link = build_control(TensorsInMemory(Path("held.safetensors"), ldm_state_dict(controlnet)))
    assert isinstance(link, ControlNet)
    _assert_equal(link, controlnet, models)


def test_the_original_layouts_names_are_those_the_library_converts() -> None:
    """convert_controlnet_checkpoint has its own table of these names (for SD 1.x files)."""
    controlnet = build_controlnet(build_models(Path("none"), "sd15"))
    stored = {f"control_model.{key}": tensor for key, tensor in ldm_state_dict(controlnet).items()}
    converted = convert_controlnet_checkpoint(stored, dict(controlnet.config))
    expected = controlnet.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


def test_a_small_sdxl_controlnet_without_attention_is_read(tmp_path: Path) -> None:
    """Like controlnet-canny-sdxl-1.0-small: no attention, a single resnet in the middle block."""
    models = build_models(Path("none"), "sdxl")
    config = {**build_controlnet(models).config, "down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        controlnet = ControlNetModel.from_config(config).eval()
        for convolution in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            torch.nn.init.normal_(convolution.weight)
    link = load_controlnet(write_controlnet(tmp_path / "small.safetensors", controlnet, layout="diffusers"))
    assert isinstance(link, ControlNet)
    _assert_equal(link, controlnet, models)


def test_a_shuffle_controlnet_pools_its_residuals(tmp_path: Path) -> None:
    controlnet = build_controlnet(build_models(Path("none"), "sd15"))
    link = load_controlnet(write_controlnet(tmp_path / "control_v11e_sd15_shuffle.safetensors", controlnet))
    assert link.global_average_pooling
    assert link.copy().global_average_pooling


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("lllite_unet_input_blocks_4.down.0.weight",), "ControlLLLite"),
        (("ip_adapter.1.to_k_ip.weight",), "IP-Adapter"),
        (("controlnet_x_embedder.weight", "transformer_blocks.0.x"), "Flux"),
        (("control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight", "difference"), "differences"),
        (("first_stage_model.decoder.conv_in.weight",), "a VAE, not a ControlNet"),
        (("zero_convs.0.0.weight", "input_blocks.0.0.weight", "lora_controlnet"), "no layers that read the hint"),
        (("body.0.block1.weight",), "T2I-Adapter lacks conv_in.weight"),
        (("what.weight",), "not a supported ControlNet"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, keys: tuple[str, ...], words: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(2, 2) for key in keys}, path)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_controlnet(path)
    assert "other.safetensors" in str(caught.value)


def test_an_incomplete_file_names_the_first_missing_tensor(tmp_path: Path) -> None:
    stored = ldm_state_dict(build_controlnet(build_models(Path("none"), "sd15")))
    del stored["zero_convs.3.0.weight"]
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=r"zero_convs\.3\.0\.weight"):
        load_controlnet(tmp_path / "cut.safetensors")
