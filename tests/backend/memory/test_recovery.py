"""Recovery when work runs out of memory, with fake work and with models on a virtual GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from backend import memory_management
from backend.args import BackendConfig
from backend.devices import virtual_gpu
from backend.devices.probing import probe_devices
from backend.devices.virtual_gpu import Faults
from backend.memory import current
from backend.memory.errors import OutOfMemory
from backend.memory.recovery import is_out_of_memory, run_with_remedies
from backend.patcher.base import ModelPatcher

KIB = 1024


def failing(times: int) -> Callable[[], str]:
    left = [times]

    def run() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("no room")
        return "done"

    return run


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (OutOfMemory("x", device="cuda:0", need_bytes=None, table=()), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_mean_no_room(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_remedies_are_taken_in_order_until_it_works() -> None:
    taken: list[str] = []

    def remedy(name: str) -> Callable[[], str]:
        return lambda: taken.append(name) or name

    assert run_with_remedies(failing(2), [remedy("one"), remedy("two"), remedy("three")], "work") == "done"
    assert taken == ["one", "two"]
    assert run_with_remedies(failing(0), [remedy("never")], "work") == "done"
    assert taken == ["one", "two"]


def test_after_a_remedy_that_had_nothing_to_do_nothing_is_run() -> None:
    assert run_with_remedies(failing(1), [lambda: "", lambda: "something"], "work") == "done"
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        run_with_remedies(failing(1), [lambda: ""], "work")


def test_other_errors_pass() -> None:
    def run() -> None:
        raise RuntimeError("wrong shape")

    with pytest.raises(RuntimeError, match="wrong shape"):
        run_with_remedies(run, [lambda: "something"], "work")


def test_a_failed_attempt_keeps_nothing_alive() -> None:
    seen: list[weakref.ref[object]] = []

    class Scratch:
        pass

    def run() -> None:
        scratch = Scratch()
        seen.append(weakref.ref(scratch))
        raise torch.OutOfMemoryError("no room")

    def remedy() -> str:
        assert seen[-1]() is None
        return "looked"

    with pytest.raises(torch.OutOfMemoryError):
        run_with_remedies(run, [remedy], "work")


# on a virtual GPU


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    config = BackendConfig(virtual_gpus_bytes=(2**20,))
    memory_management.configure(config, probe_devices(config))
    memory_management.set_inference_memory(0)
    yield memory_management.get_torch_device()
    memory_management.set_inference_memory(memory_management.DEFAULT_INFERENCE_BYTES)
    current.forget()


def patcher(num_layers: int, device: torch.device) -> ModelPatcher:
    net = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(num_layers))).requires_grad_(False)
    return ModelPatcher(net, load_device=device, offload_device=torch.device("cpu"))


def work_with(model: ModelPatcher, device: torch.device, scratch_kib: int) -> Callable[[], torch.Tensor]:
    x = torch.arange(32.0)

    def run() -> torch.Tensor:
        scratch = torch.zeros(scratch_kib * KIB, dtype=torch.uint8, device=device)
        return (model.model(x.to(device)) + scratch[0]).cpu()

    return run


def test_others_leave_before_the_model_at_work_streams(gpu: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    used, other = patcher(64, gpu), patcher(64, gpu)
    expected = used.model(torch.arange(32.0))
    memory_management.load_models_gpu([other])
    memory_management.load_models_gpu([used])
    result = memory_management.run_with_recovery(work_with(used, gpu, 700), what="a step", device=gpu, keep=[used.clone()])
    assert torch.equal(result, expected)
    assert [entry.real_model for entry in memory_management.current_loaded_models] == [used.model]
    assert memory_management.current_loaded_models[0].streamed is None
    assert "Out of memory during a step: Sequential evicted from vgpu:0; trying again." in caplog.text


def test_the_model_at_work_streams_in_the_end(gpu: torch.device) -> None:
    used = patcher(64, gpu)
    expected = used.model(torch.arange(32.0))
    memory_management.load_models_gpu([used])
    result = memory_management.run_with_recovery(work_with(used, gpu, 860), what="a step")
    assert torch.equal(result, expected)
    assert 0 < memory_management.current_loaded_models[0].streamed.resident_bytes <= 128 * KIB
    memory_management.run_with_recovery(work_with(used, gpu, 1010), what="a step", device=gpu, keep=[used])
    assert memory_management.current_loaded_models[0].streamed.resident_bytes == 0


def test_what_cannot_work_ends_in_the_table(gpu: torch.device) -> None:
    used = patcher(64, gpu)
    memory_management.load_models_gpu([used])
    with pytest.raises(OutOfMemory, match=r"vgpu:0 ran out of memory during a step\. .*\n  vgpu:0 \(virtual GPU\): total 1 MiB"):
        memory_management.run_with_recovery(work_with(used, gpu, 2000), what="a step", device=gpu, keep=[used])
    assert torch.equal(work_with(used, gpu, 1)(), used.model(torch.arange(32.0, device=gpu)).cpu())


@pytest.mark.parametrize("allocation", range(1, 12, 2))
def test_an_error_at_any_allocation_leaves_the_same_result(gpu: torch.device, allocation: int) -> None:
    used = patcher(8, gpu)
    expected = used.model(torch.arange(32.0))
    memory_management.load_models_gpu([used])
    virtual_gpu.get_device(gpu).set_faults(Faults(out_of_memory_at=frozenset({allocation})))
    result = memory_management.run_with_recovery(work_with(used, gpu, 1), what="a step", device=gpu, keep=[used])
    assert torch.equal(result, expected)


def test_models_leave_after_a_job_only_where_memory_is_short(gpu: torch.device) -> None:
    used = patcher(4, gpu)
    memory_management.load_models_gpu([used])
    memory_management.release_after_job()
    assert used.current_device == gpu
    config = BackendConfig(virtual_gpus_bytes=(2**20,), vram_mode="low")
    memory_management.configure(config, probe_devices(config))
    memory_management.load_models_gpu([used])
    assert used.current_device == gpu
    memory_management.release_after_job()
    assert used.current_device.type == "cpu"


def test_embedding_tables_are_looked_up_on_the_host(gpu: torch.device) -> None:
    net = nn.Sequential(nn.Embedding(4000, 256), nn.Linear(256, 8)).requires_grad_(False)  # 4 MB of table on a card of 1 MB
    model = ModelPatcher(net, load_device=gpu, offload_device=torch.device("cpu"))
    tokens = torch.tensor([[1, 3999]])
    expected = net(tokens)
    memory_management.load_models_gpu([model])
    for placed in (tokens, tokens.to(gpu)):
        result = net(placed)
        assert result.device == gpu and torch.equal(result.cpu(), expected)
    assert virtual_gpu.get_device(gpu).peak_bytes < 100 * KIB
