"""Pictures with a ControlNet Union against diffusers' StableDiffusionXLControlNetUnionPipeline: same files, hints, kinds, prompts and noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLControlNetUnionPipeline
from diffusers.models.controlnets import MultiControlNetUnionModel
from torch import Tensor

from backend import memory_management
from backend.args import BackendConfig
from backend.controlnet_loader import load_controlnet
from backend.devices.probing import probe_devices
from backend.patcher.controlnet import ControlNetError, apply_controlnet_advanced
from backend.patcher.controlnet_union import UnionControlNet
from backend.text_processing.clip_tokenizer import build_clip_tokenizer
from tests.parity.test_controlnet_parity import CONFIG, NUM_STEPS, SIDE_PX, Loaded, _assert_same, _cpu_engine, _noise
from tests.parity.test_pipeline_parity import NEGATIVE, PROMPT
from tests.support.controlnets import build_union, hint, write_controlnet

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")
__all__ = ["_cpu_engine"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    memory_management.configure(CONFIG, probe_devices(BackendConfig(device_ids=("cpu",))))
    return Loaded("sdxl", tmp_path_factory.mktemp("sdxl"))


def _link(union: object, folder: Path) -> UnionControlNet:
    link = load_controlnet(write_controlnet(folder / "union.safetensors", union, layout="diffusers"))
    assert isinstance(link, UnionControlNet)
    return link


def _library_picture(loaded: Loaded, noise: Tensor, union: object, **arguments: object) -> Tensor:
    models = loaded.models
    pipeline = StableDiffusionXLControlNetUnionPipeline(
        vae=models.vae, text_encoder=models.text_encoders[0], text_encoder_2=models.text_encoders[1], tokenizer=build_clip_tokenizer(),
        tokenizer_2=build_clip_tokenizer(pad_token_id=0), unet=models.unet, controlnet=union, scheduler=loaded.scheduler(), add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    images: Tensor = pipeline(
        prompt=PROMPT, negative_prompt=NEGATIVE, height=SIDE_PX, width=SIDE_PX, guidance_scale=5.0, num_inference_steps=NUM_STEPS, latents=noise,
        output_type="pt", **arguments,
    ).images  # fmt: skip
    return images


@pytest.mark.parametrize(("control_type", "num_types"), [(0, 8), (3, 6), (7, 8)])
def test_one_hint_of_a_kind(loaded: Loaded, tmp_path: Path, control_type: int, num_types: int) -> None:
    union = build_union(loaded.models, num_types=num_types)
    link, noise = _link(union, tmp_path), _noise()
    library = _library_picture(loaded, noise, union, control_image=[hint()], control_mode=[control_type], controlnet_conditioning_scale=0.8)
    unet = apply_controlnet_advanced(loaded.unet, link.of_type(control_type), hint(), 0.8, 0.0, 1.0)
    _assert_same(loaded.our_picture(unet, noise), library, loaded.plain_picture())


def test_two_units_share_the_network(loaded: Loaded, tmp_path: Path) -> None:
    union, noise, hints = build_union(loaded.models), _noise(), [hint(seed=5), hint(seed=6)]
    link = _link(union, tmp_path)
    library = _library_picture(
        loaded, noise, MultiControlNetUnionModel([union, union]), control_image=[[hints[0]], [hints[1]]], control_mode=[1, 5],
        controlnet_conditioning_scale=[0.7, 0.4],
    )  # fmt: skip
    unet = apply_controlnet_advanced(loaded.unet, link.of_type(1), hints[0], 0.7, 0.0, 1.0)
    unet = apply_controlnet_advanced(unet, link.of_type(5), hints[1], 0.4, 0.0, 1.0)
    assert len(unet.controlnet_linked_list.get_models()) == 1
    _assert_same(loaded.our_picture(unet, noise), library, loaded.plain_picture())


def test_a_picture_of_a_batch_is_the_picture_alone(loaded: Loaded, tmp_path: Path) -> None:
    link, noise = _link(build_union(loaded.models), tmp_path), _noise(2)
    unet = apply_controlnet_advanced(loaded.unet, link.of_type(2), hint(), 1.0, 0.0, 1.0)
    together, second = loaded.our_picture(unet, noise), loaded.our_picture(unet, noise[1:])
    assert (together[1:] - second).abs().max() < 1e-3


def test_the_kind_matters_and_one_that_is_not_there_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    link, noise = _link(build_union(loaded.models, num_types=6), tmp_path), _noise()
    pictures = [loaded.our_picture(apply_controlnet_advanced(loaded.unet, link.of_type(kind), hint(), 1.0, 0.0, 1.0), noise) for kind in (0, 1)]
    assert not torch.equal(*pictures)
    with pytest.raises(ControlNetError, match=r"union\.safetensors does not support Tile hints\. Use one of OpenPose"):
        link.of_type(6)
