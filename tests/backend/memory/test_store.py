"""Models are loaded, evicted and streamed on virtual GPUs, which count every byte."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from backend.args import BackendConfig
from backend.devices import virtual_gpu
from backend.devices.probing import probe_devices
from backend.memory.errors import OutOfMemory
from backend.memory.store import MemoryStore
from backend.memory.vram_state import VRAMState
from backend.patcher.base import ModelPatcher

KIB = 1024
CPU = torch.device("cpu")
GPU_0, GPU_1 = virtual_gpu.install((KIB, KIB))  # the names exist after the device type is registered


class Net(nn.Module):
    """Layers of 4 KiB each (32 x 32 fp32), without biases."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(num_layers)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def patcher(num_layers: int, device: torch.device = GPU_0, offload: torch.device = CPU) -> ModelPatcher:
    return ModelPatcher(Net(num_layers).requires_grad_(False), load_device=device, offload_device=offload)


@pytest.fixture
def make_store() -> Iterator[object]:
    def make(*caps_kib: int, **flags: object) -> MemoryStore:
        config = BackendConfig(virtual_gpus_bytes=(2**20,) * len(caps_kib), multi_gpu=True, **flags)
        virtual_gpu.install(())
        slots = probe_devices(config)
        for device, cap_kib in zip(virtual_gpu.installed_devices(), caps_kib):
            virtual_gpu.get_device(device).cap_bytes = cap_kib * KIB
        return MemoryStore(config, slots)

    yield make


def load(store: MemoryStore, *models: ModelPatcher, work_kib: int = 0, preserved_kib: int = 0) -> None:
    store.load(models, memory_required_bytes=work_kib * KIB, inference_bytes=0, preserved_bytes=preserved_kib * KIB)


def live_kib(device: torch.device) -> float:
    return virtual_gpu.get_device(device).live_bytes / KIB


def test_a_model_is_loaded_and_evicted_completely(make_store) -> None:
    store, model = make_store(100), patcher(4)
    load(store, model)
    assert live_kib(GPU_0) == 16 and model.current_device == GPU_0
    store.unload_all()
    assert live_kib(GPU_0) == 0 and model.current_device == CPU
    assert store.residents == []


def test_the_least_recently_used_leaves_and_only_it(make_store) -> None:
    store = make_store(64)
    one, two, three = patcher(4), patcher(4), patcher(6)
    load(store, one)
    load(store, two)
    load(store, one)  # used again: now `two` is the oldest
    load(store, three, work_kib=12)  # 24 KiB * 1.3 + 12 > 64 - 32
    assert [entry.real_model for entry in store.residents] == [three.model, one.model]
    assert live_kib(GPU_0) == 24 + 16
    assert two.current_device == CPU


def test_models_of_one_call_do_not_evict_each_other(make_store) -> None:
    store = make_store(64)
    one, two = patcher(5), patcher(5)
    load(store, one)
    load(store, one, two, work_kib=4)
    assert live_kib(GPU_0) == 40


def test_devices_do_not_disturb_each_other(make_store) -> None:
    store = make_store(32, 32)
    one, two = patcher(5, GPU_0), patcher(5, GPU_1)
    load(store, one)
    load(store, two)
    load(store, patcher(6, GPU_1))
    assert live_kib(GPU_0) == 20


def test_an_unreferenced_network_is_forgotten(make_store) -> None:
    store, model = make_store(64), patcher(4)
    load(store, model)
    del model
    assert live_kib(GPU_0) == 0
    store.drop_dead()
    assert store.residents == []


def test_a_clone_that_dies_leaves_the_network_known(make_store) -> None:
    store, model = make_store(64), patcher(4)
    load(store, model.clone())
    assert len(store.residents) == 1 and store.residents[0].model is None
    store.unload_all()
    assert live_kib(GPU_0) == 0 and next(model.model.parameters()).device == CPU


def test_a_clones_attributes_leave_with_it(make_store) -> None:
    store, model = make_store(64), patcher(1)
    model.model.mark = "own"
    clone = model.clone()
    clone.add_object_patch("mark", "clone's")
    load(store, clone)
    assert model.model.mark == "clone's"
    load(store, model)
    assert model.model.mark == "own"
    assert len(store.residents) == 1


def test_what_does_not_fit_streams_and_gives_the_same_numbers(make_store) -> None:
    store, model = make_store(40), patcher(16)  # 64 KiB of weights on a card of 40
    x = torch.randn(2, 32)
    expected = model.model(x)
    load(store, model, work_kib=4)
    (entry,) = store.residents
    assert entry.streamed is not None and entry.model_accelerated
    assert 0 < entry.streamed.resident_bytes < 40 * KIB
    on_device = x.to(GPU_0)
    for _ in range(2):
        assert torch.equal(model.model(on_device).cpu(), expected)
    assert live_kib(GPU_0) * KIB == entry.streamed.resident_bytes + x.nbytes
    assert virtual_gpu.get_device(GPU_0).peak_bytes <= 40 * KIB
    store.unload_all()
    assert torch.equal(model.model(x), expected)


def test_a_streamed_model_is_loaded_completely_when_memory_is_free(make_store) -> None:
    store, model = make_store(40), patcher(16)
    load(store, model)
    virtual_gpu.get_device(GPU_0).cap_bytes = 400 * KIB
    load(store, model)
    assert store.residents[0].streamed is None and live_kib(GPU_0) == 64


def test_a_streamed_model_is_not_moved_again_for_a_small_change(make_store) -> None:
    store, model = make_store(40), patcher(16)
    load(store, model)
    virtual_gpu.reset_copied_bytes()
    virtual_gpu.get_device(GPU_0).cap_bytes += 256
    load(store, model)
    assert virtual_gpu.copied_bytes() == {}


def test_an_error_in_a_streamed_layer_leaves_its_weights_on_the_host(make_store) -> None:
    store, model = make_store(40), patcher(16)
    load(store, model)
    with pytest.raises(RuntimeError):
        model.model(torch.zeros(2, 7, device=GPU_0))
    gc.collect()
    assert live_kib(GPU_0) * KIB == store.residents[0].streamed.resident_bytes
    assert model.model(torch.zeros(2, 32, device=GPU_0)).device == GPU_0


@pytest.mark.parametrize("flags", [{"vram_mode": "no"}, {"cpu_offload": True}])
def test_flags_that_keep_weights_on_the_host(make_store, flags: dict[str, object]) -> None:
    store, model = make_store(400, **flags), patcher(4)
    load(store, model)
    assert live_kib(GPU_0) == 0
    assert model.model(torch.zeros(1, 32, device=GPU_0)).device == GPU_0
    assert live_kib(GPU_0) == 0


def test_always_offload_evicts_all_others(make_store) -> None:
    store = make_store(400, always_offload=True)
    one, two = patcher(2), patcher(3)
    load(store, one)
    load(store, two)
    assert live_kib(GPU_0) == 12


def test_high_vram_never_streams_and_its_models_stay(make_store) -> None:
    store = make_store(40, vram_mode="high")
    assert store.state_of(GPU_0) is VRAMState.HIGH_VRAM
    stays = patcher(5, offload=GPU_0)
    load(store, stays)
    with pytest.raises(OutOfMemory):
        load(store, patcher(8))
    assert live_kib(GPU_0) == 20


def test_out_of_memory_names_what_uses_memory(make_store) -> None:
    store = make_store(40, 64, vram_mode="high")
    other, large = patcher(6, GPU_1), patcher(16)
    load(store, other)
    with pytest.raises(OutOfMemory) as caught:
        load(store, large)
    error = caught.value
    assert (error.device, error.need_bytes) == ("vgpu:0", 64 * KIB)
    assert [row.device for row in error.table] == ["vgpu:0", "vgpu:1"]
    assert error.table[1].holders == (("Net", 24 * KIB),)
    assert str(error).startswith("vgpu:0 ran out of memory during loading Net, which needs 0 MiB.")
    assert "vgpu:1 (virtual GPU): total 0 MiB, free 0 MiB, used by Net 0 MiB" in str(error)
    assert isinstance(error.__cause__, torch.OutOfMemoryError)
    assert live_kib(GPU_0) == 0 and next(large.model.parameters()).device == CPU


def test_preserved_bytes_are_nobodys(make_store) -> None:
    store, model = make_store(40), patcher(8)
    load(store, model, preserved_kib=16)
    assert store.residents[0].streamed is not None


def test_free_memory_frees_the_requested_bytes(make_store) -> None:
    store = make_store(64)
    one, two = patcher(4), patcher(4)
    load(store, one)
    load(store, two)
    store.free(40 * KIB, GPU_0)
    assert [entry.real_model for entry in store.residents] == [two.model]
    store.free(0, GPU_0, free_all=True, keep=store.residents[:])
    assert len(store.residents) == 1
    store.free(0, GPU_0, free_all=True)
    assert store.residents == []


def test_rooms_report_free_evictable_and_present_bytes(make_store) -> None:
    store = make_store(64, 64)
    one, two = patcher(4), patcher(2, GPU_1)
    load(store, one)
    load(store, two)
    rooms = store.rooms(store.slots, one.model)
    assert [(room.free_bytes, room.evictable_bytes, room.present_bytes) for room in rooms] == [
        (48 * KIB, 0, 16 * KIB),
        (56 * KIB, 8 * KIB, 0),
    ]


def test_many_loads_leave_bytes_where_they_were(make_store) -> None:
    store = make_store(48)
    models = [patcher(4), patcher(7), patcher(20)]
    levels = []
    for turn in range(12):
        load(store, models[turn % 3], work_kib=2)
        models[turn % 3].model(torch.zeros(1, 32, device=GPU_0))
        levels.append(live_kib(GPU_0))
    assert levels[3:6] == levels[6:9] == levels[9:12]
    store.unload_all()
    assert live_kib(GPU_0) == 0


def test_models_in_use_are_never_evicted(make_store) -> None:
    store = make_store(64)
    held, other = patcher(8), patcher(4)
    load(store, held)
    store.hold([held.clone()])
    load(store, other, work_kib=60)
    store.free(0, GPU_0, free_all=True)
    assert [entry.real_model for entry in store.residents] == [held.model]
    assert store.rooms(store.slots)[0].evictable_bytes == 0
    store.hold([])
    store.free(0, GPU_0, free_all=True)
    assert store.residents == []


def test_large_work_evicts_others_but_does_not_make_the_model_stream(make_store) -> None:
    store = make_store(64)
    other, model = patcher(4), patcher(8)
    load(store, other)
    load(store, model, work_kib=60)
    assert [entry.real_model for entry in store.residents] == [model.model] and store.residents[0].streamed is None
