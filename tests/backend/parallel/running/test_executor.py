"""Rows through replicas and stages. Reference: the program run row by row in one place, with the same shapes, bit for bit."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backend.devices import virtual_gpu
from backend.devices.virtual_gpu import Faults
from backend.nn.network_call import NetworkCall
from backend.nn.unet_program import UNetProgram as Program
from backend.nn.unet_program import build_program
from backend.parallel.placing.fleet import Fleet
from backend.parallel.planning.plan import Piece, ReplicaPlan
from backend.parallel.running.executor import Cancelled, Executor, Replica, SlotFailure
from backend.parallel.running.worker import SlotLost
from tests.support.checkpoints import build_models
from tests.support.fleets import cpu_fleet, virtual_fleet

ROWS = 3


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def program(request: pytest.FixtureRequest) -> Program:
    return build_program(build_models(Path("none"), request.param).unet)


def _call(program: Program, *, control: bool = False, options: dict[str, Any] | None = None) -> NetworkCall:
    config: Any = program.embedding.unet.config
    generator = torch.Generator().manual_seed(4)
    width = config.projection_class_embeddings_input_dim
    rows = {
        "x": torch.randn(ROWS, config.in_channels, 16, 16, generator=generator),
        "timesteps": torch.tensor([900.0, 500.0, 20.0]),
        "context": torch.randn(ROWS, 77, config.cross_attention_dim, generator=generator),
    }
    if width is not None:
        rows["y"] = torch.randn(ROWS, width, generator=generator)
    call = NetworkCall(rows=rows, options=options or {})
    if not control:
        return call
    shapes = _skip_shapes(program, call)
    residuals = {
        "output": [torch.randn(shape, generator=generator) * 0.1 for shape in shapes],
        "middle": [torch.randn(shapes[-1], generator=generator) * 0.1],
    }
    return NetworkCall(rows=call.rows, control=residuals)


@torch.no_grad()
def _skip_shapes(program: Program, call: NetworkCall) -> list[torch.Size]:
    shapes: list[torch.Size] = []

    def note(h: Tensor, skip: Tensor, options: object) -> tuple[Tensor, Tensor]:
        shapes.append(skip.shape)
        return h, skip

    noting = NetworkCall(rows=call.rows, options={"patches": {"output_block_patch": [note]}})
    program.run(noting.start(program))
    return shapes[::-1]


@torch.no_grad()
def _row_by_row(program: Program, call: NetworkCall) -> Tensor:
    parts = [call.take_rows(row, row + 1) for row in range(call.num_rows)]
    return torch.cat([program.run(part.start(program)) for part in parts])


def _u_cut(pieces: tuple[Piece, ...], *slots: int) -> tuple[int, ...]:
    """Nested slots: the first has both ends."""
    depth = len(slots)
    bounds = [len(pieces) * (index + 1) // (2 * depth - 1) for index in range(2 * depth - 1)]
    order = [*slots, *reversed(slots[:-1])]
    return tuple(order[next(index for index, bound in enumerate(bounds) if place < bound)] for place in range(len(pieces)))


def _straight(pieces: tuple[Piece, ...], *slots: int) -> tuple[int, ...]:
    return tuple(slots[place * len(slots) // len(pieces)] for place in range(len(pieces)))


CUTS = {"straight": _straight, "u": _u_cut}


EVERY_TIME = {(1, "straight", True), (2, "u", True), (2, "straight", False), (3, "u", False), (4, "straight", True)}
"""Number of virtual GPUs, cut, and whether copies are asynchronous: each of them, while all combinations wait for the night."""


def _place(program: Program, fleet: Fleet, plan: ReplicaPlan) -> Program:
    """A copy of the program with its layers placed by the plan."""
    moved = build_program(copy.deepcopy(program.embedding.unet))
    for _, layer in moved.embedding.named_layers:
        layer.to(fleet.device(plan.slots[0]))
    for piece, slot in zip(plan.pieces, plan.slots):
        for _, layer in moved.piece_layers(piece):
            layer.to(fleet.device(slot))
    return moved


@pytest.mark.parametrize(
    ("count", "cut", "asynchronous"),
    [
        pytest.param(count, cut, asynchronous, marks=[] if (count, cut, asynchronous) in EVERY_TIME else [pytest.mark.nightly])
        for count in (1, 2, 3, 4)
        for cut in CUTS
        for asynchronous in (True, False)
    ],
)
def test_layers_over_virtual_gpus_give_every_row_bit_for_bit(program: Program, count: int, cut: str, asynchronous: bool) -> None:
    call, pieces = _call(program, control=True), program.finest_pieces()
    expected = _row_by_row(program, call)
    with virtual_fleet(count) as gpus:
        plan = ReplicaPlan(pieces=pieces, slots=CUTS[cut](pieces, *(slot.index for slot in gpus.slots)))
        executor = Executor([Replica(program=_place(program, gpus, plan), plan=plan)], gpus, deal=lambda rows: (rows,), asynchronous=asynchronous)
        home = gpus.primary.torch_device
        moved = call.on(home, lambda tensor, device: tensor.to(device))
        output = executor.run(moved)
        executor.close()
        assert output.device == home
        assert torch.equal(output.cpu(), expected)


def test_only_what_is_used_elsewhere_crosses(program: Program) -> None:
    """In a U-cut the outer skips stay on their slot: less crosses than in a straight cut."""
    call, pieces = _call(program), program.finest_pieces()
    crossed = {}
    with virtual_fleet(2) as fleet:
        for name, cut in CUTS.items():
            plan = ReplicaPlan(pieces=pieces, slots=cut(pieces, 0, 1))
            executor = Executor([Replica(program=_place(program, fleet, plan), plan=plan)], fleet, deal=lambda rows: (rows,))
            moved = call.on(fleet.primary.torch_device, lambda tensor, device: tensor.to(device))
            before = sum(fleet.transport.stats.bytes_by_pair().values())
            executor.run(moved)
            crossed[name] = sum(fleet.transport.stats.bytes_by_pair().values()) - before
    assert 0 < crossed["u"] < crossed["straight"]


@pytest.mark.parametrize("shares", [(2, 1), (0, 3), (3, 0)], ids=str)
def test_replicas_on_cpu_slots_give_rows_in_order(program: Program, shares: tuple[int, int]) -> None:
    call = _call(program, control=True)
    with cpu_fleet(2) as fleet:
        pieces = program.whole_pieces()
        replicas = [Replica(program=program, plan=ReplicaPlan(pieces=pieces, slots=(slot,) * len(pieces))) for slot in (0, 1)]
        output = Executor(replicas, fleet, deal=lambda rows: shares).run(call)
    assert torch.equal(output, _row_by_row(program, call))


def test_many_calls_at_once_do_not_mix(program: Program) -> None:
    call, pieces = _call(program), program.whole_pieces()
    expected = _row_by_row(program, call)
    outputs: dict[int, Tensor] = {}
    with cpu_fleet(2) as fleet:
        plan = ReplicaPlan(pieces=pieces, slots=_u_cut(pieces, 0, 1))
        executor = Executor([Replica(program=program, plan=plan)], fleet, deal=lambda rows: (rows,))

        def run(row: int) -> None:
            outputs[row] = executor.run(call.take_rows(row, row + 1))

        lanes = [threading.Thread(target=run, args=(row,)) for row in range(ROWS)]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
    assert torch.equal(torch.cat([outputs[row] for row in range(ROWS)]), expected)


def test_hooks_run_on_the_slot_and_see_the_rows_they_work_on(program: Program) -> None:
    seen: list[tuple[str, tuple[int, ...], str]] = []

    def note(h: Tensor, when: str, options: dict[str, Any]) -> Tensor:
        seen.append((str(h.device), tuple(options["cond_or_uncond"]), str(options["sigmas"].device)))
        return h

    options = {"block_modifiers": [note], "cond_or_uncond": [1, 1, 0], "sigmas": torch.tensor([3.0])}
    with virtual_fleet(2) as fleet:
        pieces = program.whole_pieces()
        plan = ReplicaPlan(pieces=pieces, slots=_straight(pieces, 0, 1))
        home = fleet.primary.torch_device
        call = _call(program, options={**options, "sigmas": options["sigmas"].to(home)})  # type: ignore[attr-defined]
        executor = Executor([Replica(program=_place(program, fleet, plan), plan=plan)], fleet, deal=lambda rows: (rows,))
        executor.run(call.on(home, lambda tensor, device: tensor.to(device)))
    assert {(device, kinds) for device, kinds, _ in seen} == {(f"vgpu:{index}", (kind,)) for index in (0, 1) for kind in (0, 1)}
    assert all(device == sigmas for device, _, sigmas in seen)


# failure


def _split_over(fleet: Fleet, program: Program, **settings: Any) -> tuple[Executor, NetworkCall]:
    pieces = program.whole_pieces()
    plan = ReplicaPlan(pieces=pieces, slots=_u_cut(pieces, 0, 1))
    executor = Executor([Replica(program=_place(program, fleet, plan), plan=plan)], fleet, deal=lambda rows: (rows,), **settings)
    call = _call(program).on(fleet.primary.torch_device, lambda tensor, device: tensor.to(device))
    return executor, call


def test_out_of_memory_names_the_slot_and_the_next_run_is_complete(program: Program) -> None:
    expected = _row_by_row(program, _call(program))
    with virtual_fleet(2) as fleet:
        executor, call = _split_over(fleet, program)
        virtual_gpu.get_device(1).set_faults(Faults(out_of_memory_at=frozenset({20})))
        with pytest.raises(SlotFailure, match="slot 1") as failed:
            executor.run(call)
        assert failed.value.slot == 1
        assert isinstance(failed.value.cause, torch.OutOfMemoryError)
        virtual_gpu.get_device(1).set_faults(None)
        assert torch.equal(executor.run(call).cpu(), expected)


def test_a_lost_slot_is_named(program: Program) -> None:
    with virtual_fleet(2) as fleet:
        executor, call = _split_over(fleet, program)
        virtual_gpu.get_device(1).set_faults(Faults(lost_at_operation=30))
        with pytest.raises(SlotFailure) as failed:
            executor.run(call)
        assert isinstance(failed.value.cause, (SlotLost, torch.AcceleratorError))
        virtual_gpu.get_device(1).set_faults(None)


def test_a_hook_that_fails_ends_the_run_with_its_error(program: Program) -> None:
    def fail(h: Tensor, when: str, options: dict[str, Any]) -> Tensor:
        raise KeyError("no such thing")

    with cpu_fleet(2) as fleet:
        pieces = program.whole_pieces()
        plan = ReplicaPlan(pieces=pieces, slots=_straight(pieces, 0, 1))
        executor = Executor([Replica(program=program, plan=plan)], fleet, deal=lambda rows: (rows,))
        with pytest.raises(SlotFailure, match=r"KeyError.*no such thing"):
            executor.run(_call(program, options={"block_modifiers": [fail]}))


def test_cancelling_ends_a_run_between_two_pieces(program: Program) -> None:
    num_asked = 0

    def is_cancelled() -> bool:
        nonlocal num_asked
        num_asked += 1
        return num_asked > 5

    with cpu_fleet(2) as fleet:
        pieces = program.whole_pieces()
        plan = ReplicaPlan(pieces=pieces, slots=_straight(pieces, 0, 1))
        executor = Executor([Replica(program=program, plan=plan)], fleet, deal=lambda rows: (rows,), is_cancelled=is_cancelled)
        with pytest.raises(Cancelled):
            executor.run(_call(program))
    assert num_asked < len(pieces) * ROWS


def test_speeds_are_learned_from_the_runs(program: Program) -> None:
    with cpu_fleet(2) as fleet:
        pieces = program.whole_pieces()
        flops = dict.fromkeys(pieces, 1000000.0)
        plan = ReplicaPlan(pieces=pieces, slots=_straight(pieces, 0, 1))
        executor = Executor([Replica(program=program, plan=plan, work_per_row=flops)], fleet, deal=lambda rows: (rows,), work="a model")
        executor.run(_call(program))
        speeds = [fleet.speeds.speed_of(slot, "a model") for slot in (0, 1)]
    assert all(speed is not None and speed > 0 for speed in speeds)
