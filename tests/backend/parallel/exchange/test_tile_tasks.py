"""Exchanges between tiles: messages in order, no thread blocked by a wait, and every wait ended by whatever ends a tile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from backend.nn.tiles import Swaps, swap
from backend.parallel.exchange.meeting import Meeting, TilePeers
from backend.parallel.exchange.messages import MOST_PACKED_BYTES, send_message
from backend.parallel.exchange.tile_task import TileTask, finish_all
from backend.parallel.exchange.transport import Transfer, make_transport

CPU = torch.device("cpu")
TRANSPORT = make_transport()


@pytest.fixture
def pools() -> Iterator[list[ThreadPoolExecutor]]:
    made = [ThreadPoolExecutor(1) for _ in range(3)]
    yield made
    for pool in made:
        pool.shutdown(wait=False)


def make_meeting(count: int, ship: Callable[[Tensor, int], Transfer] | None = None) -> Meeting:
    return Meeting([CPU] * count, ship or (lambda tensor, rank: TRANSPORT.ship(tensor, CPU)))


def add_up(peers: TilePeers, rounds: int) -> Swaps[list[int]]:
    """Each round every tile sends a number; returns what the others sent, in order of rank."""
    seen: list[int] = []
    for turn in range(rounds):
        others = [rank for rank in range(peers.count) if rank != peers.rank]
        received = yield from swap(peers, dict.fromkeys(others, (torch.tensor(100 * turn + peers.rank),)))
        seen += [int(received[rank][0]) for rank in others]
    return seen


def test_messages_meet_whoever_comes_first_and_leave_nothing(pools: list[ThreadPoolExecutor]) -> None:
    meeting = make_meeting(3)
    tasks = [TileTask(add_up(TilePeers(meeting, rank), 50), pools[rank].submit, meeting, rank) for rank in range(3)]
    assert finish_all(tasks)[1] == [100 * turn + rank for turn in range(50) for rank in (0, 2)]
    assert not meeting._arrived
    assert not meeting._waiting


def test_tiles_that_wait_leave_their_worker(pools: list[ThreadPoolExecutor]) -> None:
    """All tiles on one thread: each wait must give the thread to the others."""
    meeting = make_meeting(3)
    tasks = [TileTask(add_up(TilePeers(meeting, rank), 3), pools[0].submit, meeting, rank) for rank in range(3)]
    assert finish_all(tasks)[0] == [1, 2, 101, 102, 201, 202]


def test_small_tensors_travel_as_one_and_come_out_as_they_were() -> None:
    shipped: list[Tensor] = []

    def ship(tensor: Tensor) -> Transfer:
        shipped.append(tensor)
        return TRANSPORT.ship(tensor, CPU)

    sent = (torch.arange(3, dtype=torch.float16), torch.rand(2, 5), torch.rand(4, 6)[:, ::2], torch.tensor(7.0, dtype=torch.float64))
    opened = send_message(sent, ship, stays_here=False).open()
    assert len(shipped) == 1
    assert shipped[0].nbytes == sum(tensor.nbytes for tensor in sent)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(opened, sent))
    shipped.clear()
    assert all(one is other for one, other in zip(send_message(sent, ship, stays_here=True).open(), sent))
    large = torch.zeros(MOST_PACKED_BYTES // 4)
    shipped.clear()
    send_message((large, large), ship, stays_here=False)
    assert len(shipped) == 2


class _Stop(BaseException):
    """What no `except Exception` catches."""


def failing_at(turn: int, error: BaseException) -> Callable[[], None]:
    left = [turn]

    def check() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error

    return check


@pytest.mark.parametrize("turn", [1, 2, 9])
@pytest.mark.parametrize("error", [_Stop(), ValueError("a hook")], ids=["stop", "hook"])
def test_an_error_ends_all_waits_and_frees_what_tiles_hold(pools: list[ThreadPoolExecutor], turn: int, error: BaseException) -> None:
    meeting = make_meeting(3)
    begun: list[int] = []
    ended: list[int] = []

    def work(peers: TilePeers) -> Swaps[list[int]]:
        begun.append(peers.rank)
        try:
            return (yield from add_up(peers, 10))
        finally:
            ended.append(peers.rank)

    peers = [TilePeers(meeting, 0), TilePeers(meeting, 1, failing_at(turn, error)), TilePeers(meeting, 2)]
    tasks = [TileTask(work(one), pools[rank].submit, meeting, rank) for rank, one in enumerate(peers)]
    with pytest.raises(type(error)):
        finish_all(tasks)
    assert sorted(ended) == sorted(begun)
    assert not meeting._arrived
    assert not meeting._waiting


def test_a_cancel_from_outside_ends_a_wait_for_a_message_that_never_comes(pools: list[ThreadPoolExecutor]) -> None:
    meeting, waiting = make_meeting(2), threading.Event()

    def work() -> Swaps[None]:
        awaited = TilePeers(meeting, 0).post({1: ()})
        waiting.set()
        yield awaited

    task = TileTask(work(), pools[0].submit, meeting, 0)
    task.start()
    assert waiting.wait(10)
    meeting.cancel()
    with pytest.raises(RuntimeError, match="another tile"):
        task.result.result(timeout=10)


def test_a_worker_that_is_gone_when_its_tile_should_go_on(pools: list[ThreadPoolExecutor]) -> None:
    meeting = make_meeting(2)
    calls: list[Any] = []

    def submit(function: Callable[[], None], /) -> Future[None]:
        calls.append(function)
        if len(calls) > 1:
            raise RuntimeError("the worker was closed")
        return pools[0].submit(function)

    tasks = [
        TileTask(add_up(TilePeers(meeting, 0), 3), submit, meeting, 0),
        TileTask(add_up(TilePeers(meeting, 1), 3), pools[1].submit, meeting, 1),
    ]
    with pytest.raises(RuntimeError, match="closed"):
        finish_all(tasks)


def test_a_copy_that_fails_ends_all_tiles(pools: list[ThreadPoolExecutor]) -> None:
    def ship(tensor: Tensor, rank: int) -> Transfer:
        if rank == 1:
            raise torch.OutOfMemoryError("slot 1 is full")
        return TRANSPORT.ship(tensor, CPU)

    meeting = make_meeting(2, ship)
    tasks = [TileTask(add_up(TilePeers(meeting, rank), 3), pools[rank].submit, meeting, rank) for rank in range(2)]
    with pytest.raises(torch.OutOfMemoryError, match="slot 1"):
        finish_all(tasks)


class _Later:
    """Something else than a message that a tile waits for."""

    def __init__(self) -> None:
        self.then: Callable[[], None] | None = None

    def when_ready(self, then: Callable[[], None]) -> None:
        self.then = then


def test_a_tile_may_wait_for_something_else(pools: list[ThreadPoolExecutor]) -> None:
    meeting, later, left = make_meeting(1), _Later(), threading.Event()

    def work() -> Any:
        yield later
        return "done"

    def submit(function: Callable[[], None], /) -> Future[None]:
        def run() -> None:
            function()
            left.set()

        return pools[0].submit(run)

    task = TileTask(work(), submit, meeting, 0)
    task.start()
    assert left.wait(10)
    assert not task.result.done()
    assert later.then is not None
    later.then()
    assert task.result.result(timeout=10) == "done"
