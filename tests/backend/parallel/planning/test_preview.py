"""The previewed plan of a checkpoint against the plan of its first job."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from backend.args import BackendConfig
from backend.checkpoint_file import CheckpointError
from backend.loader import load_checkpoint
from backend.parallel.planning import preview as preview_module
from backend.parallel.planning.live_facts import profile_of
from backend.parallel.planning.preview import preview_plan
from tests.support.checkpoints import write_checkpoint
from tests.support.fleets import virtual_fleet


@pytest.mark.parametrize(("family", "model", "side_px"), [("sd15", "SD 1.x", 512), ("sd20", "SD 2.x", 768), ("sdxl", "SDXL", 1024)])
def test_a_checkpoint_has_a_plan_before_it_is_loaded(tmp_path: Path, family: str, model: str, side_px: int) -> None:
    path = tmp_path / "narrow.safetensors"
    write_checkpoint(path, family)
    with virtual_fleet(2):
        preview = preview_plan(path)
        alone = preview_plan(path, strategy="single")
    assert (preview.model, preview.side_px, preview.images) == (model, side_px, 1)
    assert preview.plan.used_slots == (0, 1)
    assert preview.plan.reason
    assert (alone.plan.strategy, len(alone.plan.used_slots)) == ("single", 1)


def test_a_file_without_a_network_says_so(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with virtual_fleet(2), pytest.raises(CheckpointError, match="contains no UNet"):
        preview_plan(path)


@pytest.mark.parametrize("unet_dtype", [None, "fp16", "fp8_e4m3fn"])
def test_before_and_after_loading_a_plan_counts_the_bytes_that_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unet_dtype: str | None
) -> None:
    """fp8 weights count one byte each although computed in fp32, in the preview and in the job's profile."""
    path = tmp_path / "narrow.safetensors"
    write_checkpoint(path, "sd15")
    seen = []
    make_plan = preview_module.make_plan
    monkeypatch.setattr(preview_module, "make_plan", lambda profile, *args, **kwargs: seen.append(profile) or make_plan(profile, *args, **kwargs))
    with virtual_fleet(2, unet_dtype=unet_dtype):
        preview_plan(path)
        network = load_checkpoint(path, config=BackendConfig()).forge_objects.unet.model
        live = profile_of(network, (1, 4, 64, 64))
    (previewed,) = seen
    assert [cost.weight_bytes for cost in previewed.pieces] == [cost.weight_bytes for cost in live.pieces]
    assert (previewed.embedding_bytes, previewed.weight_bytes) == (live.embedding_bytes, live.weight_bytes)
    assert live.weight_bytes == sum(parameter.nbytes for parameter in network.diffusion_model.parameters())
    if unet_dtype == "fp8_e4m3fn":
        assert live.weight_bytes < 0.3 * sum(parameter.numel() * 4 for parameter in network.diffusion_model.parameters())
