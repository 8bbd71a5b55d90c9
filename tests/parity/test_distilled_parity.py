"""Distilled UNets without a middle block under several slots: the same picture as on one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import DISTILLED
from tests.support.fleets import virtual_fleet
from tests.support.narrow_application import narrow_application, pixels, submit, txt2img


@pytest.mark.parametrize("family", DISTILLED)
def test_a_distilled_checkpoint_makes_the_same_picture_on_one_slot_and_on_two(family: str, tmp_path: Path) -> None:
    with virtual_fleet(2), narrow_application(tmp_path, family) as (app, _):
        pictures = {}
        for strategy in ("single", "layers", "replicas"):
            app.options.data["multi_gpu_strategy"] = strategy
            pictures[strategy] = pixels(submit(app, txt2img(steps=2, do_not_save_samples=True)).wait(timeout_s=300).images[0])
        assert pictures["single"].std() > 5
        assert np.abs(pictures["layers"] - pictures["single"]).max() <= 1
        assert np.abs(pictures["replicas"] - pictures["single"]).max() <= 1
