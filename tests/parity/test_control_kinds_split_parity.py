"""Jobs with each kind of control model on two slots against the same jobs on one: split == whole, bit for bit (ControlNets have their own test)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.checkpoint_file import open_tensor_file
from backend.clip_vision import load_clip_vision
from backend.controlnet_loader import load_controlnet
from backend.ip_adapter import apply_ip_adapter, read_ip_adapter
from backend.parallel.running.session import SamplingSession
from backend.parallel.vae import decoding
from backend.patcher.controlnet import apply_controlnet_advanced
from backend.patcher.controlnet_union import UnionControlNet
from backend.patcher.unet import UnetPatcher
from backend.sampling import sampling_function
from modules.application import Application
from modules_forge.reference import Reference, add_reference
from tests.parity.test_split_parity import _each_row_alone
from tests.support.checkpoints import ReferenceModels
from tests.support.controlnets import build_union, hint, with_deferred_controlnets, write_control_lora, write_controlnet
from tests.support.fleets import configured_slots, virtual_fleet
from tests.support.ip_adapters import adapter_tables, build_tower, reference_picture, write_adapter_file, write_tower
from tests.support.narrow_application import narrow_application, pixels, run, txt2img

Apply = Callable[[UnetPatcher, ReferenceModels, Path], UnetPatcher]


def _control_lora(unet: UnetPatcher, models: ReferenceModels, folder: Path) -> UnetPatcher:
    write_control_lora(folder / "lora.safetensors", models)
    return apply_controlnet_advanced(unet, load_controlnet(folder / "lora.safetensors"), hint(), 1.0, 0.0, 1.0)


def _union(unet: UnetPatcher, models: ReferenceModels, folder: Path) -> UnetPatcher:
    link = load_controlnet(write_controlnet(folder / "union.safetensors", build_union(models), layout="diffusers"))
    assert isinstance(link, UnionControlNet)
    return apply_controlnet_advanced(unet, link.of_type(3), hint(), 1.0, 0.0, 1.0)


def _reference(unet: UnetPatcher, models: ReferenceModels, folder: Path) -> UnetPatcher:
    latent, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(9)).to(unet.load_device)
    return add_reference(unet, Reference(latent, noise))


def _ip_adapter(unet: UnetPatcher, models: ReferenceModels, folder: Path) -> UnetPatcher:
    with open_tensor_file(write_adapter_file(folder / "ip.safetensors", adapter_tables(models, "plus"))) as file:
        adapter = read_ip_adapter(file)
    tower = load_clip_vision(write_tower(folder / "tower.safetensors", build_tower()))
    return apply_ip_adapter(unet, adapter, tower.encode_images([np.asarray(reference_picture())], hidden_states=True))


KINDS: dict[str, tuple[str, Apply | None]] = {
    "Control-LoRA": ("sd15", _control_lora),
    "ControlNet Union": ("sdxl", _union),
    "reference_only": ("sd15", _reference),
}
BOUND = {"reference_only": 2}
"""Kinds that keep the UNet on one slot, where both branches run together, which rounds differently: the tolerance of a pixel."""


def _picture(app: Application, models: ReferenceModels, folder: Path, apply: Apply | None) -> np.ndarray:
    engine = app.models.ensure_loaded()
    original = engine.forge_objects_original
    patched = original.shallow_copy()
    if apply is not None:
        patched.unet = apply(patched.unet, models, folder)
    engine.forge_objects_original = patched
    try:
        return pixels(run(txt2img(sampler_name="Euler a", steps=2)).images[0])
    finally:
        engine.forge_objects_original = original


def _pictures(folder: Path, strategy: str) -> dict[str, np.ndarray]:
    """By kind, and "" and the family without one."""
    pictures = {}
    with narrow_application(folder, "sd15", "sdxl") as (app, models):
        app.options.set("multi_gpu_strategy", strategy)
        for family in ("sd15", "sdxl"):
            app.options.set("sd_model_checkpoint", f"{family}.safetensors")
            for kind, (own, apply) in {**KINDS, f"nothing, {family}": (family, None)}.items():
                if own == family:
                    pictures[kind] = _picture(app, models[family], folder, apply)
    return pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, np.ndarray]:
    with pytest.MonkeyPatch.context() as patch, configured_slots("cpu"):
        patch.setattr(sampling_function, "_call_model", _each_row_alone(with_deferred_controlnets(sampling_function._call_model)))
        return _pictures(folder, "single")


@pytest.mark.parametrize("strategy", ["replicas", "layers"])
def test_a_split_job_makes_the_whole_jobs_picture(
    strategy: str, folder: Path, alone: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decoding, "worth_splitting", lambda *args, **kwargs: False)
    monkeypatch.setattr(SamplingSession, "_rows_per_batch", lambda self, replica, share: 1)
    caplog.set_level(logging.INFO, logger="backend.parallel")
    with virtual_fleet(2):
        divided = _pictures(folder, strategy)
    for kind, (family, _) in KINDS.items():
        assert np.abs(alone[kind] - alone[f"nothing, {family}"]).max() > 2, f"{kind} acts"
        assert np.abs(divided[kind] - alone[kind]).max() <= BOUND.get(kind, 0), kind
    assert caplog.text.count("ReferenceAttention holds tensors of its own, so the UNet stays on") == 1
