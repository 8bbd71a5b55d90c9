"""What two equal slots really hold at the peak of a job that is cut over them, counted byte by byte by virtual GPUs: within a tenth of each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.devices import virtual_gpu
from backend.parallel.planning.cut_costs import MOST_IMBALANCE
from backend.parallel.running import status
from tests.support.fleets import virtual_fleet
from tests.support.narrow_application import narrow_application, run, txt2img


@pytest.mark.parametrize("width", [32, pytest.param(64, marks=pytest.mark.nightly)])
def test_a_narrow_sdxl_network_lies_evenly_on_two_equal_slots(width: int, tmp_path: Path) -> None:
    """Two pictures of 128 pixels with CFG. The text encoders lie on one of the slots, and are as large as the narrow denoiser."""
    with virtual_fleet(2), narrow_application(tmp_path, "sdxl", width=width) as (app, _):
        app.options.set("multi_gpu_strategy", "layers")
        for _ in ("the first job, which also reads the file", "the second, with text encoders and VAE in their places"):
            for index in range(2):
                virtual_gpu.get_device(index).reset_peak()
            run(txt2img(batch_size=2, width=128, height=128, do_not_save_grid=True, do_not_save_samples=True))
            low, high = sorted(virtual_gpu.get_device(index).peak_bytes for index in range(2))
            plan = status.current_plan()
            assert plan is not None and plan.is_one_cut
            assert "apart" not in plan.reason
            assert low >= (1 - MOST_IMBALANCE) * high
