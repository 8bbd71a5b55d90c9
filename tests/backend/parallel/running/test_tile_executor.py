"""Rows in tiles on teams of slots. Reference: the program run row by row in one place; sums in another order round differently."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backend.devices import virtual_gpu
from backend.devices.virtual_gpu import Faults
from backend.nn.network_call import NetworkCall
from backend.nn.unet_program import UNetProgram, build_program
from backend.parallel.placing.fleet import Fleet
from backend.parallel.planning.plan import ReplicaPlan, TileTeam
from backend.parallel.running.executor import Cancelled, Replica, SlotFailure
from backend.parallel.running.tile_executor import TileExecutor
from backend.parallel.running.worker import SlotLost
from tests.support.checkpoints import build_models
from tests.support.fleets import cpu_fleet, virtual_fleet

ROWS, HEIGHT, WIDTH = 2, 32, 8
TOLERANCE = 1e-4
"""Relative to the output's spread."""


@pytest.fixture(scope="module")
def program() -> UNetProgram:
    return build_program(build_models(Path("none"), "sd15").unet)


@pytest.fixture(scope="module")
def call(program: UNetProgram) -> NetworkCall:
    config: Any = program.embedding.unet.config
    generator = torch.Generator().manual_seed(4)
    rows = {
        "x": torch.randn(ROWS, config.in_channels, HEIGHT, WIDTH, generator=generator),
        "timesteps": torch.tensor([900.0, 20.0]),
        "context": torch.randn(ROWS, 77, config.cross_attention_dim, generator=generator),
    }
    return NetworkCall(rows=rows)


@pytest.fixture(scope="module")
def expected(program: UNetProgram, call: NetworkCall) -> Tensor:
    return run_row_by_row(program, call)


@torch.no_grad()
def run_row_by_row(program: UNetProgram, call: NetworkCall) -> Tensor:
    parts = [call.take_rows(row, row + 1) for row in range(call.num_rows)]
    return torch.cat([program.run(part.start(program)) for part in parts])


def make_executor(program: UNetProgram, fleet: Fleet, *tiles: TileTeam, **settings: Any) -> TileExecutor:
    pieces = program.whole_pieces()
    replicas = []
    for slot in [slot for team in tiles for slot in team.slots]:
        device = fleet.device(slot)
        own = program if device.type == "cpu" else build_program(copy.deepcopy(program.embedding.unet).to(device))
        replicas.append(Replica(program=own, plan=ReplicaPlan(pieces=pieces, slots=(slot,) * len(pieces)), work_per_row=dict.fromkeys(pieces, 1e6)))
    shares = {1: lambda rows: (rows,), 2: lambda rows: (rows - rows // 2, rows // 2)}[len(tiles)]
    return TileExecutor(replicas, tiles, fleet, deal=shares, **settings)


def go_home(call: NetworkCall, fleet: Fleet) -> NetworkCall:
    return call.on(fleet.primary.torch_device, lambda tensor, device: tensor.to(device))


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert float((found.cpu() - expected).abs().max()) <= TOLERANCE * float(expected.std())


TEAMS = {
    "two slots": (TileTeam(slots=(0, 1), rows=(16, 16)),),
    "uneven": (TileTeam(slots=(0, 1), rows=(23, 9)),),
    "three slots": (TileTeam(slots=(2, 0, 1), rows=(12, 11, 9)),),
    "two teams of two": (TileTeam(slots=(0, 1), rows=(16, 16)), TileTeam(slots=(2, 3), rows=(24, 8))),
}


@pytest.mark.parametrize(("teams", "asynchronous"), [*((teams, True) for teams in TEAMS), ("two slots", False)])
def test_teams_of_virtual_gpus(program: UNetProgram, call: NetworkCall, expected: Tensor, teams: str, asynchronous: bool) -> None:
    """Devices that refuse to mix: whatever a tile needs of another has been sent."""
    call = call if teams == "two teams of two" else call.take_rows(0, 1)
    expected = expected[: call.num_rows]
    with virtual_fleet(1 + max(slot for team in TEAMS[teams] for slot in team.slots)) as fleet:
        executor = make_executor(program, fleet, *TEAMS[teams], asynchronous=asynchronous)
        output = executor.run(go_home(call, fleet))
        assert output.device == fleet.primary.torch_device
        assert_near(output, expected)
        again = executor.run(go_home(call, fleet))
        executor.close()
    assert torch.equal(output.cpu(), again.cpu())


def test_cpu_slots_share_one_network_and_learn_their_speeds(program: UNetProgram, call: NetworkCall, expected: Tensor) -> None:
    with cpu_fleet(2) as fleet:
        executor = make_executor(program, fleet, TEAMS["uneven"][0], work="a model", rows_per_batch=lambda team, share: 1)
        assert_near(executor.run(call), expected)
        assert all((fleet.speeds.speed_of(slot, "a model") or 0) > 0 for slot in (0, 1))


def test_residuals_that_exist_are_cut(program: UNetProgram, call: NetworkCall) -> None:
    shapes: list[torch.Size] = []

    def note(hidden: Tensor, skip: Tensor, options: object) -> tuple[Tensor, Tensor]:
        shapes.append(skip.shape)
        return hidden, skip

    with torch.no_grad():
        program.run(NetworkCall(rows=call.rows, options={"patches": {"output_block_patch": [note]}}).start(program))
    generator = torch.Generator().manual_seed(6)
    output = [torch.randn(shape, generator=generator) for shape in shapes[::-1]]
    controlled = NetworkCall(rows=call.rows, control={"output": output, "middle": [torch.randn(shapes[0], generator=generator)]})
    with virtual_fleet(2) as fleet:
        executor = make_executor(program, fleet, TEAMS["uneven"][0])
        found = executor.run(go_home(controlled.take_rows(0, 1), fleet))
    assert_near(found, run_row_by_row(program, controlled.take_rows(0, 1)))


# failure


@pytest.fixture
def gpus() -> Iterator[Fleet]:
    with virtual_fleet(3) as fleet:
        yield fleet
        for index in range(3):
            virtual_gpu.get_device(index).set_faults(None)


@pytest.mark.parametrize("allocation", [1, 400])
def test_out_of_memory_names_the_slot_frees_all_and_the_next_run_is_complete(
    program: UNetProgram, call: NetworkCall, expected: Tensor, gpus: Fleet, allocation: int
) -> None:
    executor, moved = make_executor(program, gpus, TEAMS["two slots"][0]), go_home(call.take_rows(0, 1), gpus)
    executor.run(moved)
    held_bytes = [virtual_gpu.get_device(index).live_bytes for index in range(3)]
    virtual_gpu.get_device(1).set_faults(Faults(out_of_memory_at=frozenset({allocation})))
    with pytest.raises(SlotFailure, match="slot 1") as failed:
        executor.run(moved)
    assert isinstance(failed.value.cause, torch.OutOfMemoryError)
    assert [virtual_gpu.get_device(index).live_bytes for index in range(3)] == held_bytes
    virtual_gpu.get_device(1).set_faults(None)
    assert_near(executor.run(moved), expected[:1])


@pytest.mark.parametrize("operation", [2, 300])
def test_a_lost_slot_is_named(program: UNetProgram, call: NetworkCall, gpus: Fleet, operation: int) -> None:
    executor, moved = make_executor(program, gpus, TEAMS["two slots"][0]), go_home(call.take_rows(0, 1), gpus)
    virtual_gpu.get_device(1).set_faults(Faults(lost_at_operation=operation))
    with pytest.raises(SlotFailure) as failed:
        executor.run(moved)
    assert isinstance(failed.value.cause, (SlotLost, torch.AcceleratorError))


def test_interrupt_ends_all_tiles_at_their_next_exchange(program: UNetProgram, call: NetworkCall) -> None:
    num_asked = 0

    def is_cancelled() -> bool:
        nonlocal num_asked
        num_asked += 1
        return num_asked > 40

    with cpu_fleet(2) as fleet:
        executor = make_executor(program, fleet, TEAMS["two slots"][0], is_cancelled=is_cancelled)
        with pytest.raises(Cancelled):
            executor.run(call)
    assert num_asked < 60


def test_a_hook_that_fails_amid_the_exchanges_ends_the_run_with_its_error(program: UNetProgram, call: NetworkCall) -> None:
    seen: list[tuple[int, int, int]] = []

    def fail_late(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        seen.append(extra["tile_rows"])
        if len(seen) > 5:
            raise KeyError("no such thing")
        return q

    options = {"patches_replace": {"attn2": {("input", 1): fail_late, ("input", 4): fail_late, ("output", 9): fail_late}}}
    with cpu_fleet(2) as fleet:
        executor = make_executor(program, fleet, TEAMS["uneven"][0])
        with pytest.raises(SlotFailure, match=r"KeyError.*no such thing"):
            executor.run(NetworkCall(rows=call.rows, options=options))
    assert set(seen[:2]) == {(0, 23, 32), (23, 32, 32)}
