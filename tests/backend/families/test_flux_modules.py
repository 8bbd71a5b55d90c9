"""Flux.1's files besides the checkpoint: what is missing, what takes whose place, what fits nothing, and where the text encoders go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend import loader, memory_management
from backend.args import BackendConfig
from backend.checkpoint_file import CheckpointError
from backend.loader import load_checkpoint
from modules.checkpoints.families import facts_of
from tests.support.fleets import virtual_fleet
from tests.support.flux_checkpoints import FluxFiles, write_flux
from tests.support.t5_encoders import t5_encoder, write_t5

PROMPT = ["a red cat"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FluxFiles:
    return write_flux(tmp_path_factory.mktemp("data"), "original", name="flux1-dev")


@pytest.fixture
def slots() -> Iterator[Any]:
    with virtual_fleet(2) as fleet:
        yield fleet
        memory_management.unload_all_models()


def load(files: FluxFiles, *modules: Path) -> Any:
    return load_checkpoint(files.checkpoint, config=BackendConfig(), additional_modules=modules)


def t5_weight(engine: Any) -> torch.Tensor:
    return engine.forge_objects.clip.cond_stage_model["t5xxl"].encoder.block[0].layer[0].SelfAttention.q.weight.float().cpu()


def test_one_missing_part_is_named_with_file_size_and_folder(files: FluxFiles, slots: Any) -> None:
    vae, clip, _ = files.modules
    with pytest.raises(CheckpointError) as refused:
        load(files, vae, clip)
    assert str(refused.value) == (
        "flux1-dev.safetensors needs a T5-XXL text encoder: put t5xxl_fp16.safetensors (9.5 GB) into models/text_encoder and choose it under "
        "'VAE / Text Encoder', or use a checkpoint that has one."
    )


def test_all_missing_parts_are_named_at_once(files: FluxFiles, slots: Any) -> None:
    with pytest.raises(CheckpointError) as refused:
        load(files)
    assert str(refused.value) == (
        "flux1-dev.safetensors needs a CLIP-L text encoder, a T5-XXL text encoder and a VAE: put clip_l.safetensors (0.25 GB) and "
        "t5xxl_fp16.safetensors (9.5 GB) into models/text_encoder and ae.safetensors (0.34 GB) into models/VAE and choose them under "
        "'VAE / Text Encoder', or use a checkpoint that has them."
    )


def test_a_module_takes_the_checkpoint_s_place_and_the_later_of_two_counts(files: FluxFiles, slots: Any, tmp_path: Path) -> None:
    whole = write_flux(tmp_path, "all-in-one")
    other, another = t5_encoder(seed=1), t5_encoder(seed=2)
    paths = [write_t5(tmp_path / f"{name}.safetensors", encoder) for name, encoder in (("one", other), ("two", another))]
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    for modules, expected in (((), files.t5), (paths[:1], other), (paths, another), (paths[::-1], other)):
        engine = load(whole, *modules)
        torch.testing.assert_close(t5_weight(engine), expected.state_dict()[name], atol=2e-3, rtol=2e-3)


def test_what_fits_no_part_is_said(files: FluxFiles, slots: Any, tmp_path: Path) -> None:
    wide = write_t5(tmp_path / "wide.safetensors", t5_encoder(width=48))
    with pytest.raises(CheckpointError, match=r"reads text features 32 wide, but the text encoders give .*T5-XXL 48 \(wide\.safetensors\)"):
        load(files, *files.modules[:2], wide)
    clip = load_file(files.modules[1])
    halved = {key: (tensor[..., :32] if tensor.shape[-1:] == (64,) else tensor).contiguous() for key, tensor in clip.items()}
    save_file(halved, tmp_path / "small_clip.safetensors")
    with pytest.raises(CheckpointError, match=r"small_clip\.safetensors: was chosen as VAE / Text Encoder, but this Flux\.1 checkpoint"):
        load(files, *files.modules, tmp_path / "small_clip.safetensors")
    scaled = write_t5(tmp_path / "scaled.safetensors", files.t5, more={"encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"scaled\.safetensors: .*has a scale .* but is stored as float32"):
        load(files, *files.modules[:2], scaled)


def test_text_encoders_go_to_another_slot_and_leave_without_a_second_reading(files: FluxFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with virtual_fleet(2):
        engine = load(files, *files.modules)
        assert engine.forge_objects.clip.patcher.load_device != engine.forge_objects.unet.load_device
        expected = {key: value.cpu() for key, value in engine.get_learned_conditioning(PROMPT).items()}
        memory_management.unload_all_models()
    with virtual_fleet(1):
        engine = load(files, *files.modules)
        assert engine.forge_objects.clip.patcher.load_device == engine.forge_objects.unet.load_device

        def refuse(path: Path) -> Any:
            raise AssertionError(f"{path} is read again")

        monkeypatch.setattr(loader, "open_tensor_file", refuse)
        for _ in range(2):
            conditions = engine.get_learned_conditioning(PROMPT)
            memory_management.unload_all_models()
            encoder = engine.forge_objects.clip.cond_stage_model
            assert {parameter.device.type for parameter in encoder.parameters()} == {"cpu"}
            for key, value in expected.items():
                torch.testing.assert_close(conditions[key].cpu(), value)


def test_the_page_knows_a_flux_file_by_its_header(files: FluxFiles) -> None:
    facts = facts_of(SimpleNamespace(path=files.checkpoint))  # type: ignore[arg-type]
    assert facts is not None
    assert (facts.name, facts.takes_distilled, facts.multiple_px, facts.defaults.preset) == ("flux", True, 16, "flux")
    assert facts.build_token_counter is not None and facts.build_token_counter().get_prompt_lengths("cat dog bird") == (3, 255)
