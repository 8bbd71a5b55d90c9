"""Where weights are while a plan replaces another. Reference: bytes counted by virtual GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backend.devices import virtual_gpu
from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.parallel.placing.fleet import Fleet
from backend.parallel.placing.placement import place_plan
from backend.parallel.planning.plan import Plan, ReplicaPlan
from backend.patcher.unet import UnetPatcher
from tests.support.checkpoints import build_models
from tests.support.fleets import virtual_fleet


def _plan(unet: UnetPatcher, first: int, end: int) -> Plan:
    """Slot 1 has the segments from `first` up to, but not including, `end`; slot 0 has the rest."""
    pieces = unet.model.program.whole_pieces()
    slots = tuple(int(first <= place < end) for place in range(len(pieces)))
    return Plan(strategy="layers", replicas=(ReplicaPlan(pieces=pieces, slots=slots),), reason="by hand")


def _held(fleet: Fleet) -> list[int]:
    return [virtual_gpu.get_device(slot.index).live_bytes for slot in fleet.slots]


@pytest.mark.parametrize("later", [(7, 14), (9, 26), (2, 11)], ids=str)
def test_slots_that_swap_layers_never_have_both(later: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Slot 1 goes from segments 5 to 12 to others: some leave it and some arrive."""
    with virtual_fleet(2) as fleet:
        home = fleet.primary.torch_device
        unet = UnetPatcher(KModel(build_models(Path("none"), "sd15").unet, Prediction()), home, torch.device("cpu"))
        before = {name: tensor.clone() for name, tensor in unet.model.state_dict().items()}
        place_plan(unet, _plan(unet, 5, 12), fleet, working_bytes=0)
        held = _held(fleet)
        for slot in fleet.slots:
            virtual_gpu.get_device(slot.index).peak_bytes = 0
        place_plan(unet, _plan(unet, *later), fleet, working_bytes=0)
        now = _held(fleet)
        peaks = [virtual_gpu.get_device(slot.index).peak_bytes for slot in fleet.slots]
        after = {name: tensor.cpu() for name, tensor in unet.model.state_dict().items()}
    assert held != now
    for was, found, peak in zip(held, now, peaks):
        assert peak <= 1.01 * max(was, found)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
