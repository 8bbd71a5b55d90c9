"""Runs pieces of a program by replaying recorded launches, once the same pieces have run on the same shapes before.

A thread of Python launches thousands of kernels per step, and all slots share one interpreter; a recording is launched with one call. Recordings are
kept per thread (a slot's worker), program, pieces, and shapes and types of the state's tensors. They hold addresses: `begin_run` drops those whose
weights have moved; weights patched in place keep theirs. A state with hooks or residuals runs as always.

Example: a UNet's 26 pieces on one slot. Steps 1 and 2 run them one by one; step 3 records; from then on the inputs are copied to where the recording
reads them, it is replayed, and its results are copied out, as the next replay overwrites them.

Knows no plan, no sampler and no family. Memory management may take the memory at any time between steps (`release`); weights may move with it, so
nothing is recorded on that device before the next `begin_run`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from backend.devices.launch_graphs import GraphMaker, LaunchGraph
from backend.nn.piece import Piece
from backend.nn.program import Program, ProgramState

logger = logging.getLogger(__name__)

LAUNCH_BOUND_SHARE = 0.8
"""A stage whose launches take less than this share of its time on the device gains little from being recorded."""
RECORD_AFTER = 2
"""Runs of the same pieces on the same shapes before they are recorded: a shape that is used once is not worth it."""
_Key = tuple[Any, ...]


@dataclass(slots=True)
class _Stage:
    """What is known about pieces on shapes. `inputs` are the tensors that the graph reads, `after` the state that recording left behind."""

    num_runs: int = 0
    cannot: bool = False
    graph: LaunchGraph | None = None
    device: torch.device | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    after: ProgramState | None = None
    own_bytes: int = 0
    started: Any = None
    ended: Any = None
    launch_ms: float = 0.0

    @property
    def num_bytes(self) -> int:
        return self.own_bytes + (0 if self.graph is None else self.graph.num_bytes)

    def forget(self) -> None:
        self.graph, self.after, self.inputs, self.own_bytes, self.num_runs = None, None, {}, 0, 0


@dataclass(slots=True)
class _Recorded:
    """A program's stages, by thread, pieces, shapes and facts. `addresses`: of its weights, as a hash."""

    addresses: int
    may_record: bool
    must_pay: bool
    stages: dict[_Key, _Stage] = field(default_factory=dict)


class StageRecorder:
    """Recordings of all programs of this process; they go with their program. Thread-safe: each thread replays only what it recorded."""

    name = "recorded launches"

    def __init__(self, maker: GraphMaker, *, record_after: int = RECORD_AFTER) -> None:
        self._maker, self._record_after = maker, record_after
        self._programs: WeakKeyDictionary[Program, _Recorded] = WeakKeyDictionary()
        self._short: set[torch.device] = set()
        """Devices that were short of memory in this run."""
        self._lock = threading.Lock()

    def run(self, program: Program, pieces: Sequence[Piece], state: ProgramState) -> None:
        """As `program.run_pieces`. Raises: what it raises."""
        device, recorded = next(iter(state.tensors.values())).device, self._programs.get(program)
        facts = program.facts_of_launches(state) if recorded is not None and recorded.may_record and device not in self._short else None
        if recorded is None or facts is None:
            program.run_pieces(pieces, state)
            return
        stage = self._stage_of(recorded, pieces, state, facts)
        if stage.graph is None and not stage.cannot and stage.num_runs >= self._record_after and self._pays(stage, recorded):
            self._record(stage, program, pieces, state, device)
        if stage.graph is None:
            stage.num_runs += 1
            with self._measured(stage, device) if stage.num_runs == self._record_after else nullcontext():
                program.run_pieces(pieces, state)
        else:
            _replay(stage, state)

    @contextmanager
    def _measured(self, stage: _Stage, device: torch.device) -> Iterator[None]:
        """Note how long the host launches the stage and when the device starts and ends it."""
        stage.started, began_s = self._maker.mark(device), time.perf_counter()
        yield
        stage.launch_ms, stage.ended = (time.perf_counter() - began_s) * 1000.0, self._maker.mark(device)

    def _pays(self, stage: _Stage, recorded: _Recorded) -> bool:
        """Whether the host held the device back: the device was done almost when the last launch came. Otherwise the stage stays as it is."""
        if not recorded.must_pay:
            return True
        device_ms = self._maker.ms_between(stage.started, stage.ended)
        if device_ms is not None and stage.launch_ms < LAUNCH_BOUND_SHARE * device_ms:
            stage.cannot = True
        return device_ms is not None and not stage.cannot

    def begin_run(self, program: Program, mode: str) -> None:
        """Call it when a run starts or its plan changes, with "off", "auto" or "on": without it a program is not recorded.

        "auto" records a stage only if launching it takes longer than computing it, as measured in the run before the recording.
        Drops recordings if a weight has another address than when they were made. Weights that stream from the host have no address to record.
        """
        weights = [parameter for segment in program.segments for _, parameter in segment.named_parameters()]
        devices, addresses = {weight.device for weight in weights}, hash(tuple(weight.data_ptr() for weight in weights))
        known = self._programs.get(program)
        stages = known.stages if known is not None and known.addresses == addresses else {}
        with self._lock:
            self._short -= devices
            may_record = mode != "off" and bool(devices) and all(map(self._maker.can_record, devices))
            self._programs[program] = _Recorded(addresses, may_record, mode == "auto", stages)

    # memory

    def bytes_on(self, device: torch.device) -> int:
        """Bytes that recordings hold on a device."""
        return sum(stage.num_bytes for stage in self._stages_on(device))

    def release(self, device: torch.device) -> int:
        """Drop a device's recordings, and make none there in this run; returns their bytes."""
        stages = self._stages_on(device)
        freed_bytes = sum(stage.num_bytes for stage in stages)
        self._short.add(device)
        for stage in stages:
            stage.forget()
        if freed_bytes:
            logger.info("Recorded launches on %s were dropped to make room (%.0f MiB).", device, freed_bytes / 2**20)
        return freed_bytes

    def _stages_on(self, device: torch.device) -> list[_Stage]:
        with self._lock:
            return [stage for recorded in self._programs.values() for stage in list(recorded.stages.values()) if stage.device == device]

    # one stage

    def _stage_of(self, recorded: _Recorded, pieces: Sequence[Piece], state: ProgramState, facts: Hashable) -> _Stage:
        shapes = tuple((name, tensor.shape, tensor.dtype, tensor.stride()) for name, tensor in state.tensors.items())
        with self._lock:
            return recorded.stages.setdefault((threading.get_ident(), torch.is_inference_mode_enabled(), tuple(pieces), shapes, facts), _Stage())

    def _record(self, stage: _Stage, program: Program, pieces: Sequence[Piece], state: ProgramState, device: torch.device) -> None:
        """Record the pieces, on copies of the state's tensors. What cannot be recorded is remembered, and said once."""
        inputs = {name: tensor.clone() for name, tensor in state.tensors.items()}
        after = replace(state, tensors=dict(inputs), residuals={}, options=dict(state.options))
        try:
            graph = self._maker.record(lambda: program.run_pieces(pieces, after), device)
        except torch.OutOfMemoryError:
            stage.num_runs = 0  # not now; there may be room later
        except RuntimeError as error:
            stage.cannot = True
            logger.warning("Launches of a stage on %s cannot be recorded and run one by one: %s", device, str(error).splitlines()[0])
        else:
            stage.graph, stage.device, stage.inputs, stage.after = graph, device, inputs, after
            stage.own_bytes = sum(tensor.nbytes for tensor in inputs.values())


def _replay(stage: _Stage, state: ProgramState) -> None:
    """Fill the inputs, replay, and take copies of the results."""
    assert stage.graph is not None and stage.after is not None
    for name, tensor in stage.inputs.items():
        tensor.copy_(state.tensors[name])
    stage.graph.replay()
    given, results = state.tensors, stage.after.tensors
    state.tensors = {name: given[name] if stage.inputs.get(name) is tensor else tensor.clone() for name, tensor in results.items()}
    state.take_facts(stage.after)
