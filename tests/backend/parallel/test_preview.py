"""The plan for a checkpoint against the plan that its first job makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from backend.checkpoint_file import CheckpointError
from backend.parallel.preview import preview_plan
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
    with virtual_fleet(2), pytest.raises(CheckpointError, match="holds no UNet"):
        preview_plan(path)
