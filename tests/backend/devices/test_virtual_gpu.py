"""Virtual GPUs: they compute what the CPU computes, refuse what a GPU refuses, and count every byte.

Reference values are the CPU's own results.
"""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from backend.args import BackendConfig
from backend.devices import virtual_gpu
from backend.devices.device_memory import read_device_bytes
from backend.devices.probing import probe_devices
from backend.devices.virtual_gpu import Faults, VirtualDevice, VirtualTensor

MIB = 2**20
CONTEXTS = (torch.no_grad, torch.inference_mode, torch.enable_grad)


@pytest.fixture
def gpus() -> Iterator[tuple[torch.device, ...]]:
    yield virtual_gpu.install((4 * MIB, 2 * MIB))
    gc.collect()


@pytest.fixture
def first(gpus: tuple[torch.device, ...]) -> VirtualDevice:
    return virtual_gpu.get_device(gpus[0])


# where tensors are


def test_factories_moves_and_results_are_on_the_device(gpus: tuple[torch.device, ...]) -> None:
    for made in (
        torch.empty(2, 3, device=gpus[1]),
        torch.zeros(2, 3, device="vgpu:1"),
        torch.tensor([1.0, 2.0], device=gpus[1]),
        torch.arange(4, device=gpus[1]),
        torch.randn(2, 3).to("vgpu:1"),
        torch.randn(2, 3).vgpu(1),
        torch.zeros_like(torch.zeros(2), device=gpus[1]),
        torch.zeros(2, device=gpus[0]).to(gpus[1]),
        torch.ones(2, device=gpus[1]) + 1,
        torch.ones(2, device=gpus[1]).new_zeros(3),
        torch.ones(4, device=gpus[1]).chunk(2)[1],
        torch.ones(4, device=gpus[1])[torch.tensor([0, 1])],
        torch.full((2,), 3.0, device=gpus[1]).half(),
    ):
        assert made.device == gpus[1]
        assert isinstance(made, VirtualTensor)
    assert torch.ones(2, device=gpus[1]).cpu().device.type == "cpu"
    assert torch.zeros(2, device="vgpu").device == gpus[0]


def test_values_leave_as_numbers_lists_and_arrays(gpus: tuple[torch.device, ...]) -> None:
    x = torch.tensor([1.5, 2.5], device=gpus[0])
    assert x.tolist() == [1.5, 2.5]
    assert x.sum().item() == 4.0
    assert bool((x > 1).all())
    assert x.cpu().numpy().tolist() == [1.5, 2.5]
    assert "vgpu:0" in repr(x)
    assert f"{x[0]:.1f}" == "1.5"
    with pytest.raises((RuntimeError, TypeError)):
        x.numpy()


def test_random_numbers_are_the_cpus(gpus: tuple[torch.device, ...]) -> None:
    expected = torch.randn(3, generator=torch.Generator().manual_seed(7))
    made = torch.randn(3, device=gpus[0], generator=torch.Generator().manual_seed(7))
    assert torch.equal(made.cpu(), expected)


@pytest.mark.parametrize("context", CONTEXTS)
def test_mixing_two_devices_raises_torchs_error(gpus: tuple[torch.device, ...], context: Callable[[], AbstractContextManager[object]]) -> None:
    with context():
        x, y, on_cpu = torch.ones(2, 2, device=gpus[0]), torch.ones(2, 2, device=gpus[1]), torch.ones(2, 2)
        for operation in (
            lambda: x + y,
            lambda: x + on_cpu,
            lambda: on_cpu + x,
            lambda: x @ y,
            lambda: nn.functional.linear(x, on_cpu),
            lambda: nn.functional.linear(on_cpu, x),
            lambda: torch.cat([x, y]),
            lambda: torch.where(x > 0, x, y),
            lambda: x.add_(y),
            lambda: on_cpu.add_(x),
            lambda: on_cpu[torch.zeros(1, dtype=torch.long, device=gpus[0])],
            lambda: x.scatter_(0, torch.zeros(1, 1, dtype=torch.long), 1.0),
            lambda: nn.functional.scaled_dot_product_attention(x[None], x[None], y[None]),
            lambda: nn.functional.conv2d(x[None, None], on_cpu[None, None]),
        ):
            with pytest.raises(RuntimeError, match=r"Expected all tensors to be on the same device|Indices should be either on"):
                operation()


def test_numbers_without_dimensions_may_be_anywhere(gpus: tuple[torch.device, ...]) -> None:
    x = torch.ones(2, device=gpus[0])
    assert (x * torch.tensor(3.0)).tolist() == [3.0, 3.0]
    x[0] = torch.tensor(5.0)
    assert x.tolist() == [5.0, 1.0]


# views and changes in place


def test_views_share_numbers_and_bytes(gpus: tuple[torch.device, ...], first: VirtualDevice) -> None:
    x = torch.zeros(4, 4, device=gpus[0])
    before_bytes = first.live_bytes
    view = x[1:3].view(-1).reshape(2, 4)
    view += 1
    assert first.live_bytes == before_bytes
    assert x.sum().item() == 8.0
    del x
    gc.collect()
    assert first.live_bytes == before_bytes  # the view keeps the whole storage
    del view
    gc.collect()
    assert first.live_bytes == 0


def test_a_change_in_place_gives_the_same_object(gpus: tuple[torch.device, ...]) -> None:
    x = torch.zeros(3, device=gpus[0])
    assert x.add_(1) is x
    assert x.contiguous() is x
    assert x.to(gpus[0]) is x
    assert torch.relu_(x) is x


def test_shape_changes_in_place_are_seen(gpus: tuple[torch.device, ...]) -> None:
    x = torch.arange(6, device=gpus[0]).view(2, 3)
    x.unsqueeze_(0).transpose_(1, 2).squeeze_(0)
    assert x.shape == (3, 2)
    assert (x + 0).tolist() == torch.arange(6).view(2, 3).T.tolist()


def test_data_can_be_exchanged_on_the_device_only(gpus: tuple[torch.device, ...]) -> None:
    x = nn.Parameter(torch.zeros(2, device=gpus[0]))
    x.data = torch.ones(3, device=gpus[0])
    assert (x * 2).tolist() == [2.0, 2.0, 2.0]
    assert x.data.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(RuntimeError, match=r"Use \.to\(\) to move it instead"):
        x.data = torch.ones(3)


def test_copies_are_independent(gpus: tuple[torch.device, ...]) -> None:
    on_cpu = torch.ones(2)
    x = on_cpu.to(gpus[0])
    back = x.cpu()
    x += 1
    assert on_cpu.tolist() == [1.0, 1.0] and back.tolist() == [1.0, 1.0]
    copied = copy.deepcopy(x)
    x += 1
    assert copied.tolist() == [2.0, 2.0]


# bytes


def test_every_byte_is_counted_and_given_back(gpus: tuple[torch.device, ...], first: VirtualDevice) -> None:
    x = torch.zeros(100, dtype=torch.float32, device=gpus[0])
    y = x.half()
    assert first.live_bytes == 400 + 200
    z = x * 2 + 1  # one temporary
    del z, y, x
    gc.collect()
    assert first.live_bytes == 0
    assert first.peak_bytes == 400 + 200 + 400 + 400
    first.reset_peak()
    assert first.peak_bytes == 0


def test_the_cap_is_enforced_and_the_error_has_the_numbers(gpus: tuple[torch.device, ...], first: VirtualDevice) -> None:
    held = torch.zeros(3 * MIB, dtype=torch.uint8, device=gpus[0])
    asked_and_true = r"vgpu:0 out of memory\. Tried to allocate 1\.50 MiB .* 4\.00 MiB: 3\.00 MiB are in use .* 1\.00 MiB are free"
    with pytest.raises(torch.OutOfMemoryError, match=asked_and_true):
        torch.zeros(3 * MIB // 2, dtype=torch.uint8, device=gpus[0])
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(3 * MIB, dtype=torch.uint8).to(gpus[1])
    assert first.live_bytes == 3 * MIB
    assert held.to(torch.uint8) is held


def test_moved_bytes_are_counted_by_pair(gpus: tuple[torch.device, ...]) -> None:
    virtual_gpu.reset_copied_bytes()
    x = torch.zeros(10).to(gpus[0])
    y = x.to(gpus[1])
    y.cpu()
    y.copy_(x)
    x.clone()
    assert virtual_gpu.copied_bytes() == {("cpu", "vgpu:0"): 40, ("vgpu:0", "vgpu:1"): 80, ("vgpu:1", "cpu"): 40}


def test_counting_is_thread_safe(gpus: tuple[torch.device, ...], first: VirtualDevice) -> None:
    def work() -> None:
        x = torch.ones(64, device=gpus[0])
        for _ in range(200):
            x = x * 1.0

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    gc.collect()
    assert first.live_bytes == 0


def test_free_and_total_are_what_memory_management_reads(gpus: tuple[torch.device, ...]) -> None:
    held = torch.zeros(MIB, dtype=torch.uint8, device=gpus[0])
    now = read_device_bytes(held.device)
    assert (now.total_bytes, now.free_bytes, now.reserved_bytes) == (4 * MIB, 3 * MIB, MIB)


# faults


def test_out_of_memory_on_request(gpus: tuple[torch.device, ...], first: VirtualDevice) -> None:
    first.set_faults(Faults(out_of_memory_at=frozenset({2})))
    torch.zeros(1, device=gpus[0])
    with pytest.raises(torch.OutOfMemoryError, match="Injected fault, allocation 2"):
        torch.zeros(1, device=gpus[0])
    torch.zeros(1, device=gpus[0])
    first.set_faults(None)


def test_random_faults_repeat_with_their_seed(gpus: tuple[torch.device, ...], first: VirtualDevice) -> None:
    def failures() -> list[int]:
        first.set_faults(Faults(out_of_memory_share=0.3, seed=5))
        failed = []
        for attempt in range(30):
            try:
                torch.zeros(1, device=gpus[0])
            except torch.OutOfMemoryError:
                failed.append(attempt)
        first.set_faults(None)
        return failed

    once = failures()
    assert once == failures()
    assert 0 < len(once) < 30


def test_a_lost_device_fails_from_then_on(gpus: tuple[torch.device, ...], first: VirtualDevice) -> None:
    x = torch.ones(2, device=gpus[0])
    first.set_faults(Faults(lost_at_operation=2))
    x + 1
    for operation in (lambda: x + 1, x.cpu, lambda: torch.zeros(2).to(gpus[0])):
        with pytest.raises(torch.AcceleratorError, match="vgpu:0 error: the device is lost"):
            operation()
    torch.ones(2, device=gpus[1])
    first.set_faults(None)


def test_a_slow_link_delays_copies_only(gpus: tuple[torch.device, ...], first: VirtualDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    waits_s: list[float] = []
    monkeypatch.setattr(time, "sleep", waits_s.append)
    x = torch.zeros(1000, dtype=torch.uint8, device=gpus[0])
    first.set_faults(Faults(link_bytes_per_s=1e6, link_latency_s=0.5))
    x + 1
    assert waits_s == []
    x.to(gpus[1])
    assert waits_s == [0.501]
    first.set_faults(None)


# modules and libraries


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_modules_move_and_parameters_stay_the_same_objects(
    gpus: tuple[torch.device, ...], context: Callable[[], AbstractContextManager[object]]
) -> None:
    with context():
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval().requires_grad_(False)
        weight = module[0].weight
        x = torch.randn(2, 4)
        expected = module(x)
        module.to(gpus[0])
        assert module[0].weight is weight and isinstance(weight, nn.Parameter)
        assert {tensor.device for tensor in (*module.parameters(), *module.buffers())} == {gpus[0]}
        assert torch.equal(module(x.to(gpus[0])).cpu(), expected)
        assert module.half()[0].weight.dtype == torch.float16
        assert module.float().to(gpus[1])[0].weight.device == gpus[1]
        module.cpu()
        assert type(weight) is nn.Parameter and weight.device.type == "cpu"


def test_state_dicts_load_into_modules_on_the_device(gpus: tuple[torch.device, ...]) -> None:
    source, target = nn.Linear(3, 3), nn.Linear(3, 3).to(gpus[0])
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.weight.cpu(), source.weight)
    other = nn.Linear(3, 3)
    other.load_state_dict(target.state_dict(), assign=True)
    assert other.weight.device == gpus[0]


def run_on(module: nn.Module, device: torch.device | str, call: Callable[[nn.Module, torch.device | str], torch.Tensor]) -> torch.Tensor:
    module.to(device)
    result = call(module, device)
    assert result.device == torch.device(device)
    module.to("cpu")
    return result.cpu()


def libraries_networks() -> dict[str, tuple[nn.Module, Callable[[nn.Module, torch.device | str], torch.Tensor]]]:
    """Narrow networks of diffusers and transformers, and a call of each."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    x_BCHW, hint_BLC, tokens_BL = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16), torch.randint(0, 99, (2, 9))
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=16,
        norm_num_groups=8,
        layers_per_block=1,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
    )
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2))
    return {
        "unet": (unet, lambda net, device: net(x_BCHW.to(device), torch.tensor([3, 700]).to(device), hint_BLC.to(device)).sample),
        "vae decode": (vae, lambda net, device: net.decode(x_BCHW.to(device)).sample),
        "vae encode": (vae, lambda net, device: net.encode(x_BCHW[:, :3].to(device)).latent_dist.mean),
        "clip": (clip, lambda net, device: net(tokens_BL.to(device), output_hidden_states=True).hidden_states[-2]),
    }


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["unet", "vae decode", "vae encode", "clip"])
def test_the_libraries_networks_equal_the_cpu_bit_for_bit(name: str, context: Callable[[], AbstractContextManager[object]]) -> None:
    (device,) = virtual_gpu.install((64 * MIB,))
    network, call = libraries_networks()[name]
    network.eval().requires_grad_(False)
    with context():
        assert torch.equal(run_on(network, "cpu", call), run_on(network, device, call))
    del network, call
    gc.collect()
    assert virtual_gpu.get_device(device).live_bytes == 0


# flags


def test_the_flag_makes_slots() -> None:
    slots = probe_devices(BackendConfig(virtual_gpus_bytes=(4 * MIB, 3 * MIB), multi_gpu=True))
    assert [(str(slot.torch_device), slot.total_bytes, slot.name) for slot in slots] == [
        ("vgpu:0", 4 * MIB, "virtual GPU"),
        ("vgpu:1", 3 * MIB, "virtual GPU"),
    ]
    assert [str(slot.torch_device) for slot in probe_devices(BackendConfig(virtual_gpus_bytes=(4 * MIB, 3 * MIB), device_ids=("1",)))] == ["vgpu:1"]


def test_a_virtual_gpu_that_is_not_there_is_named(gpus: tuple[torch.device, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"vgpu:5 does not exist; there are 2 virtual GPUs"):
        torch.zeros(1, device="vgpu:5")


def test_a_deep_copied_module_is_on_the_device_and_counted(gpus: tuple[torch.device, ...], first: VirtualDevice) -> None:
    module = nn.Linear(4, 4).to(gpus[0])
    copied = copy.deepcopy(module)
    assert copied.weight is not module.weight and copied.weight.device == gpus[0] and isinstance(copied.weight, nn.Parameter)
    assert first.live_bytes == 2 * (16 + 4) * 4


def test_an_empty_copy_on_the_meta_device_takes_no_bytes(gpus: tuple[torch.device, ...]) -> None:
    """Copies of a network start this way; leftover numbers in memory must not be taken for weights."""
    tensor = torch.ones(3, device=gpus[0])
    assert torch.empty_like(tensor, device="meta").device.type == "meta"
    assert tensor.to("meta").device.type == "meta"
