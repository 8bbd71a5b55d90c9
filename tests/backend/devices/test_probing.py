"""The slots chosen by flags on fake machines."""

from __future__ import annotations

import pytest
import torch

from backend.args import BackendConfig
from backend.devices.inventory import DeviceFacts, Inventory, take_inventory
from backend.devices.probing import DeviceError, choose_slots, describe_idle_gpus, probe_devices

GIB = 2**30


def make_inventory(*gpus_gib: int, kind: str = "cuda", throughputs: tuple[float, ...] = ()) -> Inventory:
    device_type = {"rocm": "cuda"}.get(kind, kind)
    speeds = throughputs or (1.0,) * len(gpus_gib)
    return Inventory(
        gpus=tuple(
            DeviceFacts(torch_device=torch.device(device_type, index), kind=kind, name=f"GPU {size}G", total_bytes=size * GIB, throughput=speed)
            for index, (size, speed) in enumerate(zip(gpus_gib, speeds))
        ),
        cpu=DeviceFacts(torch_device=torch.device("cpu"), kind="cpu", name="CPU", total_bytes=32 * GIB),
        num_cpu_cores=8,
        torch_build="2.13.0",
    )


def devices_of(inventory: Inventory, **flags: object) -> list[str]:
    return [str(slot.torch_device) for slot in choose_slots(inventory, BackendConfig(**flags))]


@pytest.mark.parametrize(
    ("sizes", "flags", "expected"),
    [
        ((), {}, ["cpu"]),
        ((), {"multi_gpu": True}, ["cpu"]),
        ((24,), {}, ["cuda:0"]),
        ((24, 12), {}, ["cuda:0"]),
        ((24, 12), {"multi_gpu": True}, ["cuda:0", "cuda:1"]),
        ((24, 12, 8), {"device_ids": ("2", "0")}, ["cuda:2", "cuda:0"]),
        ((24,), {"device_ids": ("cpu",)}, ["cpu"]),
        ((24,), {"device_ids": ("cpu", "cpu")}, ["cpu", "cpu"]),
        ((24,), {"device_ids": ("0", "cpu")}, ["cuda:0", "cpu"]),
        ((24,), {"device_ids": ("0", "0"), "allow_shared_slots": True}, ["cuda:0", "cuda:0"]),
        ((24, 12), {"vram_mode": "cpu"}, ["cpu"]),
        ((24,), {"vram_mode": "cpu", "device_ids": ("cpu", "cpu")}, ["cpu", "cpu"]),
    ],
)
def test_slots_of_flags(sizes: tuple[int, ...], flags: dict[str, object], expected: list[str]) -> None:
    assert devices_of(make_inventory(*sizes), **flags) == expected


@pytest.mark.parametrize(("kind", "name"), [("mps", "mps"), ("xpu", "xpu:0"), ("xpu", "xpu"), ("rocm", "0")])
def test_other_makers_are_found_by_name_and_by_number(kind: str, name: str) -> None:
    inventory = make_inventory(16, kind=kind)
    assert choose_slots(inventory, BackendConfig(device_ids=(name,)))[0].torch_device == inventory.gpus[0].torch_device
    assert choose_slots(inventory, BackendConfig())[0].torch_device == inventory.gpus[0].torch_device


def test_unknown_device_is_answered_with_what_exists() -> None:
    with pytest.raises(
        DeviceError, match=r"--device-id 5: there is no such device\. Available: 0 = cuda:0 \(GPU 24G, 24\.0 GiB\), 1 = cuda:1 .*cpu \(8 cores"
    ):
        devices_of(make_inventory(24, 12), device_ids=("0", "5"))


def test_without_any_gpu_the_remedy_names_driver_and_torch_build() -> None:
    with pytest.raises(DeviceError, match=r"torch 2\.13\.0 sees no GPU: check the driver"):
        devices_of(make_inventory(), device_ids=("0",))


def test_the_same_card_twice_needs_the_words_that_allow_it() -> None:
    config = BackendConfig(device_ids=("xpu", "xpu:0"))
    with pytest.raises(DeviceError, match=r"names xpu:0 2 times.*--allow-shared-slots"):
        choose_slots(make_inventory(16, kind="xpu"), config)


def test_slots_on_one_device_share_its_bytes_and_cores() -> None:
    slots = choose_slots(make_inventory(24), BackendConfig(device_ids=("0", "0", "cpu", "cpu"), allow_shared_slots=True))
    assert [slot.total_bytes for slot in slots] == [12 * GIB, 12 * GIB, 16 * GIB, 16 * GIB]
    assert [slot.cpu_threads for slot in slots] == [None, None, 4, 4]
    assert [slot.index for slot in slots] == [0, 1, 2, 3]


def test_threads_per_cpu_slot_can_be_said() -> None:
    slots = choose_slots(make_inventory(), BackendConfig(device_ids=("cpu", "cpu"), cpu_threads_per_slot=1))
    assert [slot.cpu_threads for slot in slots] == [1, 1]


def test_relative_speed_is_against_the_first_slot() -> None:
    inventory = make_inventory(24, 12, throughputs=(128.0, 32.0))
    assert [slot.relative_speed for slot in choose_slots(inventory, BackendConfig(multi_gpu=True))] == [1.0, 0.25]
    assert [slot.relative_speed for slot in choose_slots(inventory, BackendConfig(device_ids=("1", "0")))] == [1.0, 4.0]


def test_idle_gpus_are_named_with_the_flag_that_would_use_them() -> None:
    inventory = make_inventory(24, 12, 8)

    def idle(**flags: object) -> str:
        config = BackendConfig(**flags)
        return describe_idle_gpus(inventory, choose_slots(inventory, config), config)

    assert idle() == "2 GPUs idle: cuda:1 (GPU 12G), cuda:2 (GPU 8G); --multi-gpu uses every GPU, or those that --device-id names."
    assert idle(device_ids=("0", "1"), multi_gpu=True) == "1 GPU idle: cuda:2 (GPU 8G); --device-id 0,1 does not name it."
    assert idle(multi_gpu=True) == ""
    assert "3 GPUs idle" in idle(vram_mode="cpu", multi_gpu=True)


def test_this_machine_has_slots(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        slots = probe_devices(BackendConfig())
    assert slots and slots[0].total_bytes > 0
    assert "Devices: slot 0:" in caplog.text


def test_the_inventory_counts_only_cores_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    assert take_inventory().num_cpu_cores == 1
