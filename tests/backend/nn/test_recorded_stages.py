"""Recorded stages on a device that records operations: a replay repeats them on the same tensors, as a graph of launches does."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backend.nn.piece import Piece
from backend.nn.program import Program
from backend.nn.recorded_stages import StageRecorder
from backend.nn.unet_program import build_program
from tests.support.checkpoints import build_models
from tests.support.recording_device import CPU, RecordingDevice


@pytest.fixture(scope="module")
def unet() -> Any:
    return build_models(Path("none"), "sd15", is_shallow=True).unet


@pytest.fixture
def program(unet: Any) -> Iterator[Program]:
    with torch.no_grad():
        yield build_program(copy.deepcopy(unet))


def _rows(seed: int, side: int = 8, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, 4, side, side, generator=generator),
        "timesteps": torch.full((batch,), 900.0 - 50 * seed),
        "context": torch.randn(batch, 77, 64, generator=generator),
    }


def _run(recorder: StageRecorder, program: Program, rows: dict[str, Tensor], stages: list[tuple[Piece, ...]] | None = None, **start: Any) -> Tensor:
    state = program.start(rows, **start)
    for pieces in stages or [program.whole_pieces()]:
        recorder.run(program, pieces, state)
    output: Tensor = state.tensors[program.output]
    return output


def _expected(program: Program, rows: dict[str, Tensor], **start: Any) -> Tensor:
    return program.run(program.start(rows, **start)).clone()


@contextmanager
def _recorded(program: Program) -> Iterator[tuple[StageRecorder, RecordingDevice]]:
    """A recorder that has recorded this program on the shapes of `_rows`."""
    device = RecordingDevice()
    recorder = StageRecorder(device)
    recorder.begin_run(program, "on")
    for seed in range(3):
        _run(recorder, program, _rows(seed))
    assert len(device.graphs) == 1
    yield recorder, device


def test_a_stage_is_recorded_when_its_shapes_come_for_the_third_time_and_gives_the_same_bits(program: Program) -> None:
    device = RecordingDevice()
    recorder = StageRecorder(device)
    recorder.begin_run(program, "on")
    outputs, made = [], []
    for seed in range(6):
        outputs.append(_run(recorder, program, _rows(seed)))
        made.append(len(device.graphs))
    assert made == [0, 0, 1, 1, 1, 1]
    assert device.graphs[0].num_replays == 4
    for seed, output in enumerate(outputs):  # also those of earlier steps: a replay must not overwrite them
        assert torch.equal(output, _expected(program, _rows(seed)))


def test_stages_of_a_cut_are_recorded_each(program: Program) -> None:
    pieces, device = program.whole_pieces(), RecordingDevice()
    recorder = StageRecorder(device)
    recorder.begin_run(program, "on")
    stages = [pieces[:3], pieces[3:5], pieces[5:]]
    for seed in range(5):
        assert torch.equal(_run(recorder, program, _rows(seed), stages), _expected(program, _rows(seed)))
    assert len(device.graphs) == 3


def test_every_shape_has_its_own_recording(program: Program) -> None:
    with _recorded(program) as (recorder, device):
        for seed in range(4):
            rows = _rows(seed, side=10)
            assert torch.equal(_run(recorder, program, rows), _expected(program, rows))
        assert len(device.graphs) == 2


def test_hooks_and_residuals_run_as_always(program: Program) -> None:
    seen: list[Any] = []
    options = {"patches": {"input_block_patch": [lambda hidden, options: (seen.append(options["block"]), hidden * 1.5)[1]]}}
    addition = program.segment("middle").adds[0]
    residual = {addition: torch.ones(2, 64, 4, 4)}
    with _recorded(program) as (recorder, device):
        for seed in range(4):
            for start in ({"options": options}, {"residuals": residual}):
                assert torch.equal(_run(recorder, program, _rows(seed), **start), _expected(program, _rows(seed), **start))
        assert len(device.graphs) == 1 and device.graphs[0].num_replays == 1
        assert seen


def test_weights_patched_in_place_keep_their_recording_and_moved_ones_lose_it(program: Program) -> None:
    with _recorded(program) as (recorder, device):
        weight = program.segments[0].layers[0].weight
        weight.mul_(0.5)
        recorder.begin_run(program, "on")
        assert torch.equal(_run(recorder, program, _rows(7)), _expected(program, _rows(7)))
        assert device.graphs[0].num_replays == 2
        program.segments[0].layers[0].weight = torch.nn.Parameter(weight * 3, requires_grad=False)
        recorder.begin_run(program, "on")
        for seed in range(4):
            assert torch.equal(_run(recorder, program, _rows(seed)), _expected(program, _rows(seed)))
        assert len(device.graphs) == 2 and device.graphs[0].num_replays == 2


def test_memory_is_counted_and_given_back_until_the_next_run(program: Program) -> None:
    with _recorded(program) as (recorder, device):
        inputs = program.start(_rows(0)).tensors.values()
        assert recorder.bytes_on(CPU) == 1000 + sum(tensor.nbytes for tensor in inputs)
        assert recorder.bytes_on(torch.device("cuda:0")) == 0
        assert recorder.release(CPU) > 1000
        assert recorder.bytes_on(CPU) == 0
        for seed in range(4):
            assert torch.equal(_run(recorder, program, _rows(seed)), _expected(program, _rows(seed)))
        assert len(device.graphs) == 1, "none in the run that was short"
        recorder.begin_run(program, "on")
        for seed in range(3):
            _run(recorder, program, _rows(seed))
        assert len(device.graphs) == 2


def test_without_room_for_a_recording_the_stage_runs_one_by_one(program: Program) -> None:
    device = RecordingDevice()
    recorder, device.short = StageRecorder(device), True
    recorder.begin_run(program, "on")
    for seed in range(5):
        assert torch.equal(_run(recorder, program, _rows(seed)), _expected(program, _rows(seed)))
    assert device.graphs == []
    device.short = False
    for seed in range(3):
        _run(recorder, program, _rows(seed))
    assert len(device.graphs) == 1


def test_what_reads_from_the_device_is_not_recorded_and_said_once(program: Program, caplog: pytest.LogCaptureFixture) -> None:
    layer = program.segments[1].layers[0]
    layer.register_forward_pre_hook(lambda module, args: float(args[0].mean()) and None)
    device = RecordingDevice()
    recorder = StageRecorder(device)
    recorder.begin_run(program, "on")
    with caplog.at_level(logging.WARNING):
        for seed in range(5):
            assert torch.equal(_run(recorder, program, _rows(seed)), _expected(program, _rows(seed)))
    assert device.graphs == []
    assert [record.message for record in caplog.records] == [
        "Launches of a stage on cpu cannot be recorded and run one by one: operation not permitted when stream is capturing"
    ]


def test_a_program_is_recorded_only_after_its_weights_were_looked_at_and_only_if_all_stay(program: Program) -> None:
    device = RecordingDevice()
    recorder = StageRecorder(device)
    for seed in range(4):
        _run(recorder, program, _rows(seed))
    assert device.graphs == []
    device.can_record = lambda one: False  # type: ignore[method-assign]  # as for weights that stream from the host
    recorder.begin_run(program, "on")
    for seed in range(4):
        _run(recorder, program, _rows(seed))
    assert device.graphs == []


@pytest.mark.parametrize(("busy_ms", "num_graphs"), [(0.001, 1), (1e9, 0), (None, 0)])
def test_auto_records_only_where_launching_takes_longer_than_computing(program: Program, busy_ms: float | None, num_graphs: int) -> None:
    device = RecordingDevice(busy_ms)
    recorder = StageRecorder(device)
    recorder.begin_run(program, "auto")
    for seed in range(5):
        assert torch.equal(_run(recorder, program, _rows(seed)), _expected(program, _rows(seed)))
    assert len(device.graphs) == num_graphs


def test_off_records_nothing(program: Program) -> None:
    with _recorded(program) as (recorder, device):
        recorder.begin_run(program, "off")
        _run(recorder, program, _rows(5))
        assert device.graphs[0].num_replays == 1
        recorder.begin_run(program, "on")
        _run(recorder, program, _rows(5))
        assert device.graphs[0].num_replays == 2, "kept meanwhile"


def test_recordings_go_with_their_program(unet: Any) -> None:
    recorder, program = StageRecorder(RecordingDevice()), build_program(copy.deepcopy(unet))
    recorder.begin_run(program, "on")
    with torch.no_grad():
        for seed in range(3):
            _run(recorder, program, _rows(seed))
    assert recorder.bytes_on(CPU) > 0
    del program
    gc.collect()
    assert recorder.bytes_on(CPU) == 0
