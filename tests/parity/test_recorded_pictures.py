"""Pictures made by replaying recorded launches are the pictures made without, bit for bit, on one slot and with a copy on each of two."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from backend.nn.recorded_stages import StageRecorder
from backend.parallel.placing.fleet import current_fleet
from backend.parallel.running.run_planning import RunPlanning
from modules.application import Application
from tests.support.fleets import configured_slots, cpu_fleet
from tests.support.narrow_application import narrow_application, pixels, run, txt2img
from tests.support.recording_device import RecordingDevice


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with configured_slots("cpu"), narrow_application(tmp_path_factory.mktemp("recorded"), "sd15", is_shallow=True) as (made, _):
        made.options.samples_save = False
        yield made


def _pictures(app: Application, graphs: str) -> list[np.ndarray]:
    app.options.set("cuda_graphs", graphs)
    done = run(txt2img(steps=6, batch_size=2, negative_prompt="a dog", sampler_name="Euler a", do_not_save_grid=True))
    return [pixels(image) for image in done.images[done.index_of_first_image :]]


@pytest.mark.parametrize(("num_slots", "strategy", "num_graphs"), [(1, "auto", 1), (2, "replicas", 2)])
def test_pictures_are_the_same(app: Application, num_slots: int, strategy: str, num_graphs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows run one by one: how many run at once, which measured speeds decide, changes the rounding."""
    monkeypatch.setattr(RunPlanning, "rows_at_once", lambda self, plan, replica, share: 1)
    app.options.set("multi_gpu_strategy", strategy)
    with cpu_fleet(num_slots):
        fleet, device = current_fleet(), RecordingDevice()
        fleet.recorder = StageRecorder(device)
        expected = _pictures(app, "off")
        assert device.graphs == []
        for _ in range(2):
            assert all(np.array_equal(one, other) for one, other in zip(_pictures(app, "on"), expected, strict=True))
        assert len(device.graphs) >= num_graphs
        assert all(graph.num_replays > 1 for graph in device.graphs)
        fleet.recorder = None
        device.graphs.clear()  # they hold the weights, which a process with virtual GPUs moves only if nobody else does
    app.options.set("multi_gpu_strategy", "auto")
