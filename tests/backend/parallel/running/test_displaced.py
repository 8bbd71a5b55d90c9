"""Displaced exchanges: which calls may use what was sent a step ago, what they compute with it, and that nobody waits.

Reference for numbers: tiles run in turns in one thread, with the messages of one call given to the next.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.devices import virtual_gpu
from backend.devices.virtual_gpu import Faults
from backend.nn.network_call import NetworkCall
from backend.nn.tile_layers import finish_norm, post_norm
from backend.nn.tiles import Cut, NormMemory, Swaps, Tensors, Tile
from backend.nn.unet_program import UNetProgram, build_program
from backend.parallel.exchange.meeting import Meeting, TilePeers
from backend.parallel.exchange.transport import make_transport
from backend.parallel.planning.plan import TileTeam
from backend.parallel.running.displaced import DisplacedPasses, KeptPass
from backend.parallel.running.failures import SlotFailure
from tests.backend.parallel.running.test_tile_executor import assert_near, go_home, make_executor, run_row_by_row
from tests.support.checkpoints import build_models
from tests.support.fleets import cpu_fleet, virtual_fleet
from tests.support.tiles import LocalPeers, run_in_turns

TEAM = TileTeam(slots=(0, 1), rows=(20, 12))


@pytest.fixture(scope="module")
def program() -> UNetProgram:
    return build_program(build_models(Path("none"), "sd15").unet)


@pytest.fixture(scope="module")
def calls(program: UNetProgram) -> list[NetworkCall]:
    """Three steps of one row: the latents and the time change a little."""
    generator = torch.Generator().manual_seed(4)
    x, moved = torch.randn(1, 4, 32, 8, generator=generator), torch.randn(1, 4, 32, 8, generator=generator)
    context = torch.randn(1, 77, 64, generator=generator)
    return [
        NetworkCall(rows={"x": x + 0.1 * step * moved, "timesteps": torch.tensor([900.0 - 20 * step]), "context": context.clone()})
        for step in range(3)
    ]


# numbers


def test_a_call_that_repeats_the_one_before_gives_the_same(program: UNetProgram, calls: list[NetworkCall]) -> None:
    """What was sent a step ago is then what would be sent now."""
    with cpu_fleet(2) as fleet:
        policy = DisplacedPasses(1)
        executor = make_executor(program, fleet, TEAM, displaced=policy)
        exact, *displaced = [executor.run(calls[0]) for _ in range(3)]
        executor.close()
    assert policy.num_displaced == 2
    for one in displaced:
        assert_near(one, exact)


def test_displaced_calls_use_the_messages_of_the_call_before(program: UNetProgram, calls: list[NetworkCall]) -> None:
    sent: dict[tuple[int, int, int], Tensors] = {}
    norms: list[NormMemory] = [NormMemory() for _ in TEAM.rows]
    expected, exact = [], [run_row_by_row(program, call) for call in calls]
    for call in calls:
        output, sent, norms = run_with_messages_of(program, call, sent, norms)
        expected.append(output)
    with virtual_fleet(2) as fleet:
        executor = make_executor(program, fleet, TEAM, displaced=DisplacedPasses(1))
        found = [executor.run(go_home(call, fleet)).cpu() for call in calls]
        executor.close()
    assert_near(found[0], exact[0])
    for one, wanted, true in zip(found[1:], expected[1:], exact[1:]):
        assert_near(one, wanted)
        difference = float((one - true).std() / true.std())
        assert 1e-3 < difference < 0.2, "an approximation, but not another picture"


@torch.no_grad()
def run_with_messages_of(
    program: UNetProgram, call: NetworkCall, before: dict[tuple[int, int, int], Tensors], norms: list[NormMemory]
) -> tuple[Tensor, dict[tuple[int, int, int], Tensors], list[NormMemory]]:
    """A call whose tiles get `before` instead of what they send, which is returned. The first call, without `before`, is exact."""
    kept: dict[tuple[int, int, int], Tensors] = {}
    own = [NormMemory(before=one.now) for one in norms]

    class Swapped(LocalPeers):
        def post(self, outgoing: Any) -> Any:
            awaited = super().post(outgoing)
            for peer in outgoing:
                key = (self.num_posts, self.rank, peer)
                kept[key] = self.messages[key]
                self.messages[key] = before.get(key, kept[key])
            return awaited

    def work(peers: LocalPeers) -> Swaps[Tensor]:
        tile = Tile(Swapped(peers.rank, peers.count, peers.messages), Cut.of_rows(TEAM.rows), norms=own[peers.rank])
        state = program.start_tile(call.rows, tile, options=call.options)
        for segment in program.segments:
            yield from segment.run_tile(state, tile)
        return state.tensors[program.output]

    parts, _, _ = run_in_turns(work, len(TEAM.rows))
    return torch.cat(parts, dim=2), kept, own


@torch.no_grad()
def test_norms_are_corrected_as_in_the_paper() -> None:
    """DistriFusion, section 4.2: the old E(x) and E(x^2) of all, plus how the tile's own have changed; its own variance where that is negative."""
    generator = torch.Generator().manual_seed(3)
    norm = nn.GroupNorm(2, 4).double()
    nn.init.normal_(norm.weight)
    old = torch.randn(1, 4, 6, 5, generator=generator, dtype=torch.float64)
    new = old * 0.9 + 0.2 * torch.randn(1, 4, 6, 5, generator=generator, dtype=torch.float64)
    new[:, 2:, :2] *= 1e-3  # the first tile's second group: its own E(x^2) falls below what the others had
    rows = (2, 4)
    first, second = (one.split(rows, dim=2) for one in (old, new))

    def run(parts: Any, memories: list[NormMemory], given: dict[Any, Tensors] | None) -> tuple[list[Tensor], dict[Any, Tensors]]:
        seen: dict[Any, Tensors] = {}

        def work(peers: LocalPeers) -> Swaps[Tensor]:
            tile = Tile(peers, Cut.of_rows(rows), norms=memories[peers.rank])
            posted = post_norm(norm, parts[peers.rank], tile, with_edges=False)
            for peer in tile.others:
                key = (peers.num_posts, peers.rank, peer)
                seen[key] = peers.messages[key]
                peers.messages[key] = seen[key] if given is None else given[key]
            return (yield from finish_norm(posted, tile))

        return run_in_turns(work, len(rows))[0], seen

    memories = [NormMemory() for _ in rows]
    _, sent = run(first, memories, None)
    found, _ = run(second, [NormMemory(before=one.now) for one in memories], sent)
    for rank, part in enumerate(second):

        def moment(x: Tensor, power: int) -> Tensor:
            return x.reshape(2, -1).pow(power).mean(1)

        mean, square = (moment(old, power) + moment(part, power) - moment(first[rank], power) for power in (1, 2))
        variance = square - mean**2
        own = moment(part, 2) - moment(part, 1) ** 2
        variance = torch.where(variance > 0, variance, own)
        wanted = (part.reshape(2, -1) - mean[:, None]) / (variance[:, None] + norm.eps).sqrt()
        wanted = wanted.view_as(part) * norm.weight.view(1, 4, 1, 1) + norm.bias.view(1, 4, 1, 1)
        torch.testing.assert_close(found[rank], wanted)


def test_a_displaced_tile_waits_for_nobody(program: UNetProgram) -> None:
    """Its peer has not even begun, but sent the same exchange a step ago."""
    cpu, transport = torch.device("cpu"), make_transport()
    devices = [cpu, cpu]

    def ship(tensor: Tensor, rank: int) -> Any:
        return transport.ship(tensor, cpu)

    first = KeptPass.follow(None, TEAM, Meeting(devices, ship))
    for rank, value in enumerate((1.0, 2.0)):
        whole = torch.full((1, 1, 9, 9), value)
        TilePeers(first.meeting, rank).post({1 - rank: (whole[:, :, :1],)})
    received = first.meeting.take_or_wait(0, TilePeers(first.meeting, 0).post({}), lambda: None)
    assert received == {}
    second = KeptPass.follow(first, TEAM, Meeting(devices, ship))
    awaited = TilePeers(second.meeting, 0).post({1: (torch.zeros(1),)})
    got = second.meeting.take_or_wait(0, awaited, lambda: pytest.fail("nobody waits"))
    assert got is not None and got[1][0].unique().tolist() == [2.0]
    assert got[1][0].untyped_storage().nbytes() == got[1][0].nbytes, "a kept row does not keep the tensor it is a part of"


# which calls


def other(call: NetworkCall, **rows: Tensor) -> NetworkCall:
    return NetworkCall(rows={**call.rows, **rows})


CHANGES: dict[str, tuple[Callable[[list[NetworkCall]], NetworkCall], bool]] = {
    "the next step": (lambda calls: calls[2], True),
    "the same noise level again (second order)": (lambda calls: calls[1], True),
    "another prompt": (lambda calls: other(calls[2], context=calls[2].rows["context"] + 1), False),
    "more noise than before": (lambda calls: other(calls[2], timesteps=torch.tensor([950.0])), False),
    "another size": (lambda calls: other(calls[2], x=torch.zeros(1, 4, 24, 8)), False),
    "a ControlNet that begins": (lambda calls: NetworkCall(rows=calls[2].rows, control={"middle": [torch.zeros(1, 1, 1, 1)]}), False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_calls_that_compute_something_else_are_exact(calls: list[NetworkCall], change: str) -> None:
    make, is_displaced = CHANGES[change]
    policy = DisplacedPasses(1)
    for call in calls[:2]:
        policy.admits(call)
        policy.take(0, TEAM)
        policy.keep([KeptPass.follow(None, TEAM, Meeting([], None))])  # type: ignore[arg-type]  # nothing is sent
    assert policy.num_displaced == 1
    assert policy.admits(make(calls)) is is_displaced


def test_calls_of_two_kinds_may_alternate(calls: list[NetworkCall]) -> None:
    """A prompt and a negative prompt of different lengths run one after the other in each step."""
    policy, admitted = DisplacedPasses(2), []
    for step in range(3):
        for length in (77, 50):
            admitted.append(policy.admits(other(calls[step], context=calls[step].rows["context"][:, :length])))
            policy.keep([KeptPass.follow(None, TEAM, Meeting([], None))])  # type: ignore[arg-type]
    assert admitted == [False] * 4 + [True] * 2


def test_after_a_failure_the_next_call_is_exact_and_nothing_is_left(program: UNetProgram, calls: list[NetworkCall]) -> None:
    with virtual_fleet(2) as fleet:
        policy = DisplacedPasses(1)
        executor = make_executor(program, fleet, TEAM, displaced=policy)
        moved = [go_home(call, fleet) for call in calls]
        make_executor(program, fleet, TEAM).run(moved[0])
        held_bytes = [virtual_gpu.get_device(index).live_bytes for index in range(2)]
        for call in moved[:2]:
            executor.run(call)
        virtual_gpu.get_device(1).set_faults(Faults(out_of_memory_at=frozenset({300})))
        with pytest.raises(SlotFailure, match="slot 1"):
            executor.run(moved[2])
        virtual_gpu.get_device(1).set_faults(None)
        num_before = policy.num_displaced
        assert_near(executor.run(moved[2]), run_row_by_row(program, calls[2]))
        assert policy.num_displaced == num_before
        executor.close()
        for _ in range(100):  # a worker lets go of its last task a moment after the answer
            gc.collect()
            live_bytes = [virtual_gpu.get_device(index).live_bytes for index in range(2)]
            if live_bytes == held_bytes:
                break
            time.sleep(0.02)
        assert live_bytes == held_bytes
