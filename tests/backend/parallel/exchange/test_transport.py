"""Copies between devices: the route, the result, the counters; and CUDA's order of events, with fake streams that run at any speed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backend.devices import virtual_gpu
from backend.devices.links import Verdict
from backend.devices.slot import Slot
from backend.parallel.exchange import transport
from backend.parallel.exchange.transport import CudaCopies, DeviceTransport, choose_route, make_transport

CPU = torch.device("cpu")
CUDA0, CUDA1 = torch.device("cuda:0"), torch.device("cuda:1")
PEER, STAGED = Verdict(route="peer", reason="checked"), Verdict(route="staged", reason="wrong data")


@pytest.fixture
def two_virtual() -> tuple[torch.device, ...]:
    return virtual_gpu.install((2**20, 2**20))


# routes


@pytest.mark.usefixtures("two_virtual")
@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("cpu", "cpu", "same"),
        ("cuda:0", "cuda:0", "same"),
        ("cpu", "vgpu:0", "direct"),
        ("vgpu:0", "vgpu:1", "direct"),
        ("cuda:0", "cpu", "direct"),
        ("cpu", "cuda:1", "direct"),
        ("cuda:0", "cuda:1", "peer"),
        ("cuda:1", "cuda:0", "staged"),  # the other direction failed its test
        ("cuda:0", "cuda:2", "staged"),  # not tested
        ("xpu:0", "xpu:1", "staged"),
    ],
)
def test_card_to_card_only_where_a_verdict_trusts_it(source: str, target: str, expected: str) -> None:
    verdicts = {(CUDA0, CUDA1): PEER, (CUDA1, CUDA0): STAGED}
    assert choose_route(torch.device(source), torch.device(target), verdicts) == expected


def test_verdicts_are_named_by_slots() -> None:
    slots = [Slot(0, CUDA1, "b", 1), Slot(1, CUDA0, "a", 1)]
    made = make_transport({(0, 1): PEER, (1, 0): STAGED, (0, 7): PEER}, slots)
    assert isinstance(made, DeviceTransport)
    assert choose_route(CUDA1, CUDA0, made._verdicts) == "peer"
    assert choose_route(CUDA0, CUDA1, made._verdicts) == "staged"


# real copies


def test_a_tensor_that_is_there_is_itself_and_is_not_counted() -> None:
    sender, tensor = make_transport(), torch.arange(6.0)
    assert sender.send(tensor, CPU) is tensor
    assert sender.ship(tensor, torch.device("cpu:0")).receive() is tensor
    assert sender.stats.bytes_by_pair() == {}


def test_virtual_gpus_get_the_same_numbers_and_every_pair_is_counted(two_virtual: tuple[torch.device, ...]) -> None:
    one, other = two_virtual
    sender, original = make_transport(), torch.randn(2, 3, 4)
    there = sender.send(original, one)
    further = sender.ship(there.transpose(0, 2), other).receive()
    back = sender.send(further, CPU)
    assert (there.device, further.device) == (one, other)
    assert torch.equal(back, original.transpose(0, 2))
    assert sender.stats.bytes_by_pair() == {("cpu", "vgpu:0"): 96, ("vgpu:0", "vgpu:1"): 96, ("vgpu:1", "cpu"): 96}
    sender.send(original, one)
    assert sender.stats.copies_by_pair() == {("cpu", "vgpu:0"): 2, ("vgpu:0", "vgpu:1"): 1, ("vgpu:1", "cpu"): 1}
    assert virtual_gpu.copied_bytes()["vgpu:0", "vgpu:1"] == 96
    sender.stats.reset()
    assert sender.stats.bytes_by_pair() == {}


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 3, 4, 5)])
def test_pieces_of_a_staged_copy_cover_the_tensor_once(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_STAGE_CHUNK_BYTES", 28)
    tensor = torch.zeros(shape)
    for piece in transport._split_flat(tensor):
        assert 1 <= piece.numel() <= 7
        piece += 1
    assert torch.equal(tensor, torch.ones(shape))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "transposed", "expanded"])
def test_the_flat_order_of_a_dense_tensor_is_that_of_its_copy(layout: str) -> None:
    tensor = torch.randn(2, 3, 4, 5)
    made = {
        "contiguous": tensor,
        "channels_last": tensor.to(memory_format=torch.channels_last),
        "slice": tensor[:, :, 1:3],
        "transposed": tensor.transpose(1, 3),
        "expanded": tensor[:1].expand(4, -1, -1, -1),
    }[layout]
    dense = transport._make_dense(made)
    made_there = transport._new_like(dense, CPU)
    for source, target in zip(transport._split_flat(dense), transport._split_flat(made_there)):
        target.copy_(source)
    assert torch.equal(made_there, made)
    assert made_there.stride() == dense.stride()


# CUDA's order of events, with fake streams


@dataclass
class FakeStream:
    """Enqueued work that has not run yet."""

    device: torch.device
    queue: list[FakeEvent | Callable[[], None]] = field(default_factory=list)

    def wait_event(self, event: FakeEvent) -> None:
        self.queue.append(event)


@dataclass(eq=False)
class FakeEvent:
    passed: bool = False

    def record(self, stream: FakeStream) -> None:
        stream.queue.append(self._pass)

    def _pass(self) -> None:
        self.passed = True


class FakeCuda:
    """The part of `torch.cuda` that a transport uses. `run` runs the queued work of all streams, in an order limited only by events."""

    def __init__(self) -> None:
        self.streams = [FakeStream(device) for device in (CUDA0, CUDA1)]
        self._current = {stream.device: stream for stream in self.streams}
        self.Event = FakeEvent

    def Stream(self, device: torch.device) -> FakeStream:
        self.streams.append(FakeStream(device))
        return self.streams[-1]

    def current_stream(self, device: torch.device) -> FakeStream:
        return self._current[device]

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = self._current[stream.device]
        self._current[stream.device] = stream
        yield
        self._current[stream.device] = before

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    def run(self, seed: int) -> None:
        chooser = random.Random(seed)
        while ready := [stream for stream in self.streams if stream.queue and getattr(stream.queue[0], "passed", True)]:
            work = chooser.choice(ready).queue.pop(0)
            if not isinstance(work, FakeEvent):
                work()
        assert [len(stream.queue) for stream in self.streams] == [0] * len(self.streams), "streams wait for each other"


class FakeTensor:
    """Numbers on a device, written and read by queued work. Copies behave as torch documents them: between cards they run on the source's
    current stream, after and before the target's current stream; with main memory, on the card's current stream."""

    def __init__(self, cuda: FakeCuda, device: torch.device, values: list[int | None]) -> None:
        self.cuda, self.device, self.values = cuda, device, values
        self.nbytes = 8 * len(values)
        self.used_on: list[FakeStream] = []
        self.allocated_on = None if device == CPU else cuda.current_stream(device)
        self.pieces = [self]

    def split(self) -> list[FakeTensor]:
        """One piece per value; writing to a piece writes to the original."""
        self.pieces = [FakeTensor(self.cuda, self.device, [value]) for value in self.values]
        return self.pieces

    def read(self) -> list[int | None]:
        return [value for piece in self.pieces for value in (self.values if piece is self else piece.values)]

    def write(self, values: list[int | None]) -> None:
        self.values[:] = values
        for piece, value in zip(self.pieces, values):
            if piece is not self:
                piece.values[:] = [value]

    def copy_(self, source: FakeTensor, non_blocking: bool) -> None:
        cuda = self.cuda
        stream = cuda.current_stream(source.device if source.device != CPU else self.device)
        if CPU not in (source.device, self.device):
            before = FakeEvent()
            before.record(cuda.current_stream(self.device))
            stream.wait_event(before)
        stream.queue.append(lambda: self.write(source.read()))
        if CPU not in (source.device, self.device):
            after = FakeEvent()
            after.record(stream)
            cuda.current_stream(self.device).wait_event(after)

    def record_stream(self, stream: FakeStream) -> None:
        self.used_on.append(stream)


@pytest.fixture
def fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def new_like(tensor: Any, device: torch.device) -> Any:
        return FakeTensor(tensor.cuda, device, [None] * len(tensor.values))

    monkeypatch.setattr(transport, "_make_dense", lambda tensor: tensor)
    monkeypatch.setattr(transport, "_new_like", new_like)
    monkeypatch.setattr(transport, "_new_pinned", lambda tensor: new_like(tensor, CPU))
    monkeypatch.setattr(transport, "_split_flat", lambda tensor: tensor.split())


ROUTES = pytest.mark.parametrize("staged", [False, True], ids=["peer", "staged"])


@ROUTES
@pytest.mark.usefixtures("fake_tensors")
@given(seed=st.integers(0, 2**32))
def test_at_any_stream_speed_the_consumer_gets_what_was_produced(staged: bool, seed: int) -> None:
    """Two tensors, one after the other, from streams that are not the cards' default; two streams consume one of them."""
    cuda = FakeCuda()
    copies, seen = CudaCopies(cuda), []
    producing, consuming = cuda.Stream(CUDA0), cuda.Stream(CUDA1)
    for values in ([1, 2, 3], [4, 5]):
        with cuda.stream(producing):
            tensor: Any = FakeTensor(cuda, CUDA0, [None] * len(values))
            producing.queue.append(lambda tensor=tensor, values=values: tensor.write(values))
            transfer = copies.copy(tensor, CUDA1, staged=staged)
        with cuda.stream(consuming):
            arrived: Any = transfer.receive()
            consuming.queue.append(lambda arrived=arrived: seen.append(arrived.read()))
    again: Any = transfer.receive()
    cuda.current_stream(CUDA1).queue.append(lambda: seen.append(again.read()))
    cuda.run(seed)
    assert Counter(map(tuple, seen)) == {(1, 2, 3): 1, (4, 5): 2}


@ROUTES
@pytest.mark.usefixtures("fake_tensors")
def test_both_ends_are_kept_for_the_streams_that_use_them(staged: bool) -> None:
    cuda = FakeCuda()
    tensor: Any = FakeTensor(cuda, CUDA0, [1])
    arrived: Any = CudaCopies(cuda).copy(tensor, CUDA1, staged=staged).receive()
    (out_stream,) = tensor.used_on
    assert out_stream not in cuda.streams[:2]
    assert arrived.used_on == [cuda.current_stream(CUDA1)]
    assert arrived.allocated_on not in (cuda.current_stream(CUDA1), out_stream)
    assert arrived.allocated_on.device == CUDA1


@ROUTES
@pytest.mark.usefixtures("fake_tensors")
def test_a_copy_neither_waits_for_the_targets_work_nor_blocks_the_sources(staged: bool) -> None:
    cuda = FakeCuda()
    source_stream, target_stream = cuda.streams
    transfer = CudaCopies(cuda).copy(FakeTensor(cuda, CUDA0, [1]), CUDA1, staged=staged)  # type: ignore[arg-type]
    assert [work for work in source_stream.queue if isinstance(work, FakeEvent)] == []
    assert target_stream.queue == []
    transfer.receive()
    assert len(target_stream.queue) == 1


@pytest.mark.usefixtures("fake_tensors")
@given(seed=st.integers(0, 2**32))
def test_two_streams_of_one_card_hand_over_in_order(seed: int) -> None:
    cuda = FakeCuda()
    copies, seen = CudaCopies(cuda), []
    one, other = cuda.Stream(CUDA0), cuda.Stream(CUDA0)
    with cuda.stream(one):
        tensor: Any = FakeTensor(cuda, CUDA0, [None])
        one.queue.append(lambda: tensor.write([7]))
        transfer = copies.share(tensor)
    with cuda.stream(other):
        assert transfer.receive() is tensor
        other.queue.append(lambda: seen.append(tensor.read()))
    cuda.run(seed)
    assert seen == [[7]]
    assert tensor.used_on == [other]


# on real cards


@pytest.mark.gpu
@ROUTES
def test_a_card_to_itself_and_to_the_host(staged: bool) -> None:
    sender, original = make_transport(), torch.randn(3, 5, 7)
    there = sender.send(original, CUDA0)
    assert torch.equal(sender.send(there, CPU), original)
    assert sender.send(there, CUDA0) is there


@pytest.mark.gpu
@ROUTES
def test_two_cards_get_the_same_numbers(staged: bool) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    sender = DeviceTransport({} if staged else {(CUDA0, CUDA1): PEER})
    for shape in ((1,), (2, 4, 64, 64), (4097, 1031)):
        tensor = torch.randn(shape, device=CUDA0)
        assert torch.equal(sender.send(tensor * 2, CUDA1).cpu(), tensor.cpu() * 2)
