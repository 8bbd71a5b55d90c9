"""Decoding with all slots. Reference: the VAE on the CPU, one picture at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from backend import memory_management
from backend.devices import virtual_gpu
from backend.devices.virtual_gpu import Faults
from backend.nn.owner import owner_of
from backend.parallel.placing.fleet import Fleet
from backend.parallel.placing.replica_modules import ReplicaModules
from backend.parallel.vae import decoding
from backend.patcher.vae import VAE
from tests.support.checkpoints import build_models
from tests.support.fleets import configured_slots, cpu_fleet, virtual_fleet


def _vae(fleet: Fleet | None = None, slot: int = 0) -> VAE:
    torch.manual_seed(1)
    network = build_models(Path("none"), "sd15").vae
    decode = decoding.decode_on_all_slots
    return VAE(network, device=torch.device("cpu") if fleet is None else fleet.device(slot), dtype=torch.float32, slot_decoder=decode)


def _latents(count: int) -> Tensor:
    return torch.randn(count, 4, 16, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def alone() -> Tensor:
    with configured_slots("cpu"):
        vae = _vae()
        return torch.cat([vae.decode(latent[None]) for latent in _latents(5)])


@pytest.fixture(autouse=True)
def split_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures this small would be decoded on one slot."""
    monkeypatch.setattr(decoding, "worth_splitting", lambda *args, **kwargs: True)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("home", [0, 1])
def test_pictures_are_dealt_and_the_rest_is_split(alone: Tensor, count: int, home: int) -> None:
    with virtual_fleet(2) as fleet:
        vae = _vae(fleet, home)
        pictures = vae.decode_on_all_slots(_latents(count))
        assert pictures is not None
        assert all(virtual_gpu.get_device(index).peak_bytes > 0 for index in (0, 1))
    assert torch.allclose(pictures, alone[:count], atol=1e-5)
    assert torch.equal(pictures[: count - count % 2], alone[: count - count % 2]), "dealt pictures are decoded as they would be alone"


def test_slots_of_one_device_share_the_network(alone: Tensor) -> None:
    with cpu_fleet(2) as fleet:
        vae = _vae(fleet)
        pictures = vae.decode_on_all_slots(_latents(2))
        assert pictures is not None
        assert not owner_of(vae.first_stage_model).part(ReplicaModules)
    assert torch.equal(pictures, alone[:2])


def test_one_slot_is_left_to_itself() -> None:
    with configured_slots("cpu"):
        assert _vae().decode_on_all_slots(_latents(2)) is None


def test_without_room_for_a_copy_one_slot_decodes(alone: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with configured_slots("0", "1", virtual_bytes=(2**30, 4 * 2**20)) as fleet:
        vae = _vae(fleet)
        assert vae.decode_on_all_slots(_latents(1)) is None
        assert torch.allclose(vae.decode(_latents(1)), alone[:1], atol=1e-5)
    assert "The VAE decodes on one slot" in caplog.text


def test_a_slot_lost_while_decoding_leaves_the_rest(alone: Tensor) -> None:
    with virtual_fleet(2) as fleet:
        vae = _vae(fleet)
        vae.decode(_latents(1))
        virtual_gpu.get_device(1).set_faults(Faults(lost_at_operation=30))
        assert torch.allclose(vae.decode(_latents(1)), alone[:1], atol=1e-5)
        assert memory_management.lost_devices() == {torch.device("vgpu:1")}
        assert [slot.index for slot in fleet.working_slots] == [0]
        virtual_gpu.get_device(1).set_faults(None)


def test_copies_forget_their_weights_when_they_leave() -> None:
    with virtual_fleet(2) as fleet:
        vae = _vae(fleet)
        vae.decode_on_all_slots(_latents(2))
        memory_management.unload_all_models()
        assert virtual_gpu.get_device(1).live_bytes == 0
        (replica,) = owner_of(vae.first_stage_model).part(ReplicaModules).values()
        assert {parameter.device.type for parameter in replica.model.parameters()} == {"meta"}
