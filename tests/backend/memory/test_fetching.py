"""Weights fetched before their layer runs: what is predicted, what is refused, how much is in flight; and fake CUDA streams."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from backend.devices import virtual_gpu
from backend.memory import streaming
from backend.memory.fetching import AheadFetcher, CudaAheadCopies, DirectFetcher
from backend.memory.streaming import start_streaming, stop_streaming

MIB = 2**20
CUDA0 = torch.device("cuda:0")


class FakeCopies:
    """Copies that finish when they are requested; records the order of events and counts live copies."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.num_marks = 0
        self.has_room = True

    def begin(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not self.has_room:
            raise torch.OutOfMemoryError("made up")
        self.log.append(f"begin {tensors[0].item():.0f}")
        return [tensor.clone() for tensor in tensors]

    def finish(self, copy: list[Tensor]) -> list[Tensor]:
        self.log.append(f"finish {copy[0].item():.0f}")
        return copy

    def mark(self) -> int:
        self.num_marks += 1
        return self.num_marks

    def wait(self, mark: int) -> None:
        self.log.append(f"wait {mark}")


class Layers:
    """Layers "0", "1", ... with one number each."""

    def __init__(self, count: int) -> None:
        self.weights = {str(index): [torch.tensor(float(index))] for index in range(count)}
        self.copies = FakeCopies()
        self.fetcher = AheadFetcher(self.weights.__getitem__, self.copies)

    def run(self, *names: str) -> list[float]:
        """The number that each layer used."""
        used = []
        for name in names:
            used.append(self.fetcher.fetch(name, self.weights[name])[0].item())
            self.copies.log.append(f"compute {name}")
            self.fetcher.release(name, has_failed=False)
        return used


def test_the_first_pass_learns_and_the_next_ones_copy_ahead() -> None:
    layers = Layers(3)
    layers.run("0", "1", "2")
    assert [entry for entry in layers.copies.log if "wait" not in entry] == [
        *("begin 0", "finish 0", "compute 0", "begin 1", "finish 1", "compute 1", "begin 2", "finish 2", "compute 2")
    ]
    layers.copies.log.clear()
    assert layers.run("0", "1", "2") == [0, 1, 2]
    assert [entry for entry in layers.copies.log if "wait" not in entry] == [
        *("begin 0", "finish 0", "compute 0", "begin 1", "finish 1", "compute 1", "begin 2", "finish 2", "compute 2")
    ]
    order = layers.copies.log
    # The copy of layer 1 began after layer 0 was enqueued and before it was known to be done.
    assert order.index("begin 1") < order.index("wait 4")


def test_no_copy_begins_before_the_layer_before_the_last_is_done() -> None:
    layers = Layers(4)
    layers.run("0", "1", "2", "3")
    layers.copies.log.clear()
    layers.run("0", "1", "2", "3")
    assert layers.copies.log == [
        *("wait 4", "begin 0", "finish 0", "compute 0", "begin 1"),
        *("finish 1", "compute 1", "wait 5", "begin 2"),
        *("finish 2", "compute 2", "wait 6", "begin 3"),
        *("finish 3", "compute 3", "wait 7"),
    ]


def test_the_first_layer_of_a_pass_is_never_copied_ahead() -> None:
    layers = Layers(2)
    for _ in range(3):
        layers.run("0", "1")
        assert layers.fetcher._coming is None


@given(passes=st.lists(st.lists(st.sampled_from("01234"), max_size=8), max_size=6))
def test_in_any_order_every_layer_gets_its_weights(passes: list[list[str]]) -> None:
    layers = Layers(5)
    for names in passes:
        assert layers.run(*names) == [float(name) for name in names]


def test_weights_that_changed_on_the_way_are_copied_again() -> None:
    layers = Layers(3)
    layers.run("0", "1", "2")
    layers.run("0")
    layers.weights["1"][0].add_(10)  # in place, like a LoRA
    assert layers.run("1") == [11]
    layers.weights["2"] = [torch.tensor(22.0)]  # or by another tensor
    assert layers.run("2") == [22]


def test_without_memory_to_fetch_ahead_a_layer_is_fetched_when_due() -> None:
    layers = Layers(2)
    layers.run("0", "1")
    layers.fetcher.fetch("0", layers.weights["0"])
    layers.copies.has_room = False
    layers.fetcher.release("0", has_failed=False)
    with pytest.raises(torch.OutOfMemoryError):
        layers.fetcher.fetch("1", layers.weights["1"])
    layers.copies.has_room = True
    assert layers.run("0", "1") == [0, 1]


def test_a_layer_that_failed_is_followed_by_nothing() -> None:
    layers = Layers(2)
    layers.run("0", "1")
    layers.fetcher.fetch("0", layers.weights["0"])
    layers.fetcher.release("0", has_failed=True)
    assert layers.fetcher._coming is None
    assert layers.run("0", "1") == [0, 1]


# on networks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class DirectCopies(FakeCopies):
    """Copies to a device immediately."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def begin(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.detach().to(self.device) for tensor in tensors]

    def finish(self, copy: list[Tensor]) -> list[Tensor]:
        return copy


@pytest.mark.parametrize("ahead", [False, True])
@torch.no_grad()
def test_a_network_gives_the_same_and_keeps_to_its_budget(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (device,) = virtual_gpu.install((64 * MIB,))
    if ahead:
        monkeypatch.setattr(
            streaming,
            "_choose_fetcher",
            lambda by_name, device, ahead: AheadFetcher(lambda name: list(by_name[name].parameters(recurse=False)), DirectCopies(device)),
        )
    network, x = Net(), torch.randn(4, 256)
    expected = network(x)
    layer_bytes = 4 * (256 * 256 + 256)
    budget_bytes = 4 * layer_bytes
    streamed = start_streaming(network, device, budget_bytes, ahead=ahead)
    assert streamed.resident_bytes == (2 if ahead else 3) * layer_bytes
    there = x.to(device)
    for _ in range(3):
        virtual_gpu.get_device(0).reset_peak()
        assert torch.equal(network(there).cpu(), expected)
        assert virtual_gpu.get_device(0).peak_bytes <= budget_bytes + 3 * x.nbytes
    network.layers[3].bias.add_(1)
    network.layers[3].bias.sub_(1)
    assert torch.allclose(network(there).cpu(), expected, atol=1e-6)
    stop_streaming(streamed)
    del streamed
    assert {tensor.device.type for tensor in network.parameters()} == {"cpu", "vgpu"}


def test_a_network_whose_layer_raises_works_again(monkeypatch: pytest.MonkeyPatch) -> None:
    (device,) = virtual_gpu.install((64 * MIB,))
    fetcher = AheadFetcher(lambda name: [], DirectCopies(device))
    monkeypatch.setattr(streaming, "_choose_fetcher", lambda by_name, device, ahead: fetcher)
    network = Net()
    fetcher.tensors_of = lambda name: list(dict(network.named_modules())[name].parameters(recurse=False))
    start_streaming(network, device, 0, ahead=True)
    with torch.no_grad(), pytest.raises(RuntimeError):
        network(torch.randn(4, 99).to(device))
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}
    with torch.no_grad():
        assert network(torch.randn(4, 256).to(device)).shape == (4, 256)


def test_only_cuda_copies_ahead() -> None:
    assert isinstance(streaming._choose_fetcher({}, torch.device("cpu"), ahead=True), DirectFetcher)
    assert isinstance(streaming._choose_fetcher({}, CUDA0, ahead=False), DirectFetcher)
    assert isinstance(streaming._choose_fetcher({}, CUDA0, ahead=True), AheadFetcher)


# fake CUDA streams


class FakeCuda:
    """Records the calls on each stream."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = "computing"

    def Stream(self, device: torch.device) -> str:
        assert device == CUDA0
        return "copying"

    def current_stream(self, device: torch.device) -> Any:
        cuda, name = self, self.current

        class Stream:
            def wait_event(self, event: Any) -> None:
                cuda.log.append(f"{name} waits for {event.name}")

            def __str__(self) -> str:
                return name

        return Stream()

    @contextmanager
    def stream(self, stream: str) -> Any:
        before, self.current = self.current, stream
        yield
        self.current = before

    def Event(self) -> Any:
        cuda = self

        class Event:
            name = ""

            def record(self, stream: Any) -> None:
                self.name = f"the end of {stream}"
                cuda.log.append(f"mark {self.name}")

            def synchronize(self) -> None:
                cuda.log.append(f"host waits for {self.name}")

        return Event()


class FakeTensor:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.device, self.allocated_on = cuda, torch.device("cpu"), ""

    def is_pinned(self) -> bool:
        return False

    def detach(self) -> FakeTensor:
        return self

    def to(self, device: torch.device, non_blocking: bool) -> FakeTensor:
        copy = FakeTensor(self.cuda)
        copy.allocated_on = self.cuda.current
        self.cuda.log.append(f"copy on {self.cuda.current}")
        return copy

    def record_stream(self, stream: Any) -> None:
        self.cuda.log.append(f"kept for {stream}")


def test_a_copy_runs_on_a_separate_stream_and_the_computing_stream_waits_for_it() -> None:
    cuda = FakeCuda()
    copies: Any = CudaAheadCopies(CUDA0, cuda)
    copy = copies.begin([FakeTensor(cuda)])
    (arrived,) = copies.finish(copy)
    assert arrived.allocated_on == "copying"
    assert cuda.log == ["copy on copying", "mark the end of copying", "computing waits for the end of copying", "kept for computing"]
    cuda.log.clear()
    copies.wait(copies.mark())
    assert cuda.log == ["mark the end of computing", "host waits for the end of computing"]


@pytest.mark.gpu
@torch.no_grad()
def test_a_network_streams_ahead_on_a_real_card() -> None:
    network, x = Net(), torch.randn(4, 256)
    device = torch.device("cuda:0")
    network.to(device)
    expected = network(x.to(device)).cpu()
    streamed = start_streaming(network, device, 0, ahead=True)
    for _ in range(5):
        assert torch.equal(network(x.to(device)).cpu(), expected)
    stop_streaming(streamed)
