"""A UNet cut over slots manually. Reference: the same network on one device."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from backend.devices import virtual_gpu
from backend.modules.k_model import KModel, split_unet_across_gpus
from backend.modules.k_prediction import Prediction
from backend.parallel.planning.plan import Piece, Plan, ReplicaPlan
from tests.support.checkpoints import build_models
from tests.support.fleets import virtual_fleet


def _model() -> KModel:
    torch.manual_seed(1)
    return KModel(build_models(Path("none"), "sd15").unet, Prediction())


def _denoise(model: KModel, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 77, 64, generator=generator)
    model.predictor.to(device)
    return model.apply_model(x.to(device), torch.tensor([3.0]).to(device), c_crossattn=context.to(device)).cpu()


@pytest.mark.parametrize(("num_slots", "num_segments"), [(1, 26), (2, 26), (3, 26), (4, 26)])
def test_a_split_network_gives_the_same_picture_and_is_restored_exactly(num_slots: int, num_segments: int) -> None:
    model = _model()
    whole = _denoise(model, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pieces = model.program.finest_pieces()
    assert len(model.program.segments) == num_segments
    slots = tuple(place * num_slots // len(pieces) for place in range(len(pieces)))
    with virtual_fleet(num_slots) as fleet:
        with split_unet_across_gpus(model, ReplicaPlan(pieces=pieces, slots=slots)):
            used = {parameter.device for parameter in model.diffusion_model.parameters()}
            split = _denoise(model, fleet.primary.torch_device)
            assert list(model.state_dict()) == list(before)
        model.predictor.to("cpu")
        assert used == {slot.torch_device for slot in fleet.slots}
        gc.collect()
        assert all(virtual_gpu.get_device(index).live_bytes == 0 for index in range(num_slots))
    assert torch.equal(split, whole)
    assert model.runner is None
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) and after[name].device.type == "cpu" for name in before)


def test_no_room_on_a_slot_leaves_the_network_where_it_was() -> None:
    model = _model()
    plan = ReplicaPlan(pieces=model.program.whole_pieces(), slots=(1,) * len(model.program.segments))
    with virtual_fleet(2, cap_bytes=4 * 2**20):
        with pytest.raises(torch.OutOfMemoryError):
            split_unet_across_gpus(model, Plan(strategy="layers", replicas=(plan,), reason="by hand"))
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert model.runner is None


def test_a_plan_for_another_network_is_refused() -> None:
    with virtual_fleet(2), pytest.raises(ValueError, match="names every segment once"):
        split_unet_across_gpus(_model(), ReplicaPlan(pieces=(Piece(0), Piece(2)), slots=(0, 1)))
