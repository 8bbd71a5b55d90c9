"""Pictures with a Control-LoRA against diffusers' ControlNet pipelines, with the differences added manually to the UNet's encoder.

The library's own converter translates the file's names into the library's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from backend import memory_management
from backend.args import BackendConfig
from backend.checkpoint_file import CheckpointError
from backend.control_lora import ControlLora
from backend.controlnet_loader import load_controlnet
from backend.devices.probing import probe_devices
from backend.patcher.controlnet import ControlNetError, apply_controlnet_advanced
from tests.parity.test_controlnet_parity import CONFIG, Loaded, _assert_same, _cpu_engine, _noise
from tests.support.checkpoints import build_models
from tests.support.controlnets import apply_control_lora, hint, write_control_lora

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")
__all__ = ["_cpu_engine"]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    memory_management.configure(CONFIG, probe_devices(BackendConfig(device_ids=("cpu",))))
    return Loaded(request.param, tmp_path_factory.mktemp(request.param))


def test_a_control_lora_is_the_checkpoints_encoder_with_its_differences(loaded: Loaded, tmp_path: Path) -> None:
    stored = write_control_lora(tmp_path / "lora.safetensors", loaded.models)
    reference = apply_control_lora(loaded.models, stored)
    link = load_controlnet(tmp_path / "lora.safetensors")
    assert isinstance(link, ControlLora)
    noise = _noise(2)
    library = loaded.library_picture(noise, hint(batch=2), reference, controlnet_conditioning_scale=0.8)
    without = loaded.plain_picture(2)
    unet = apply_controlnet_advanced(loaded.unet, link, hint(batch=2), 0.8, 0.0, 1.0)
    _assert_same(loaded.our_picture(unet, noise), library, without)
    again = apply_controlnet_advanced(loaded.unet, link, hint(batch=2), 0.8, 0.0, 1.0)
    assert again.controlnet_linked_list.get_models()[0].is_clone(unet.controlnet_linked_list.get_models()[0]), "one network for both"
    assert torch.equal(loaded.our_picture(loaded.unet, noise), without), "the checkpoint's own encoder is as it was"


def test_loras_of_the_checkpoint_are_not_in_it(loaded: Loaded, tmp_path: Path) -> None:
    """The differences are relative to the plain encoder; and a picture must not depend on what the previous job merged."""
    write_control_lora(tmp_path / "lora.safetensors", loaded.models)
    name = "diffusion_model.conv_in.weight"
    changed = loaded.unet.clone()
    changed.add_patches(filename="x", patches={name: ("diff", (torch.ones(loaded.models.unet.conv_in.weight.shape),))})
    changed.refresh_loras()
    try:
        with_lora = apply_controlnet_advanced(changed, load_controlnet(tmp_path / "lora.safetensors"), hint(), 1.0, 0.0, 1.0)
    finally:
        loaded.unet.refresh_loras()
    without = apply_controlnet_advanced(loaded.unet, load_controlnet(tmp_path / "lora.safetensors"), hint(), 1.0, 0.0, 1.0)
    one, other = (unet.controlnet_linked_list.control_model.model.conv_in.weight for unet in (with_lora, without))
    assert one is not other and torch.equal(one, other)


def test_one_of_another_family_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    other = build_models(Path("none"), "sdxl" if loaded.models.family != "sdxl" else "sd15")
    write_control_lora(tmp_path / "wrong.safetensors", other)
    with pytest.raises(ControlNetError, match=r"wrong\.safetensors does not fit the checkpoint"):
        apply_controlnet_advanced(loaded.unet, load_controlnet(tmp_path / "wrong.safetensors"), hint(), 1.0, 0.0, 1.0)


def test_half_of_a_pair_is_refused(tmp_path: Path) -> None:
    stored = write_control_lora(tmp_path / "whole.safetensors", build_models(Path("none"), "sd15"))
    gone = next(key for key in stored if key.endswith(".down"))
    save_file({key: tensor for key, tensor in stored.items() if key != gone}, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=gone):
        load_controlnet(tmp_path / "half.safetensors")
