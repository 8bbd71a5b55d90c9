"""Rows of a call that go through a replica together, and what is recorded about them. Passive data."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backend import profiler
from backend.nn.network_call import NetworkCall
from backend.nn.program import ProgramState
from backend.parallel.exchange.transport import Transfer
from backend.parallel.planning.plan import Piece
from backend.parallel.running.failures import Cancelled, as_failure
from backend.parallel.running.residuals import ResidualChain
from backend.parallel.running.routing import Route, RouteStage
from backend.profiler import Mark


@dataclass(slots=True)
class Run:
    """What the rows of one call share: their position in the queue, and whether some have failed, so that the others can stop."""

    number: int
    step: int = -1
    has_failed: bool = False


@dataclass(slots=True, eq=False)
class RowBatch:
    """Rows of a call on a route.

    `stage` is where they are, `parts` what is left of it: pieces or parts of pieces, each with its piece's number in the stage. `transfers` are
    tensors in transit to later stages, by name and slot. `busy_ms`: time of the current stage before the rows waited for residuals.
    """

    call: NetworkCall
    route: Route
    run: Run
    number: int = -1
    result: Future[None] = field(default_factory=Future)
    output: Transfer | None = None
    stage: int = 0
    parts: list[tuple[int, Piece]] = field(default_factory=list)
    busy_ms: float = 0.0
    state: ProgramState | None = None
    control: ResidualChain | None = None
    transfers: dict[tuple[str, int], Transfer] = field(default_factory=dict)

    @property
    def here(self) -> RouteStage:
        return self.route.stages[self.stage]

    @property
    def is_last_stage(self) -> bool:
        return self.stage + 1 == len(self.route.stages)

    def add_time(self, busy_ms: float) -> None:
        self.busy_ms += busy_ms

    def finish(self, output: Transfer) -> None:
        """The rows are through; `output` is on its way to the call's device."""
        self.output = output
        if not self.result.done():  # else they were failed meanwhile
            self.result.set_result(None)

    def take_output(self) -> Tensor:
        """The rows' output, once `result` is there."""
        assert self.output is not None
        return self.output.receive()

    def fail(self, slot: int, error: BaseException) -> None:
        """End these rows. The other rows of the call stop at their next piece."""
        self.run.has_failed = True
        self.state = None
        self.transfers = {}
        with suppress(InvalidStateError):  # two threads may see the same failure
            self.result.set_exception(as_failure(slot, error))

    def fail_if_unfinished(self, slot: int, done: Future[None]) -> None:
        """Fail the rows if their task never ran (its worker was lost or closed)."""
        if done.cancelled():
            self.fail(slot, Cancelled())
        elif (error := done.exception()) is not None:
            self.fail(slot, error)

    # the record

    def facts(self) -> dict[str, int]:
        """What identifies these rows in a span."""
        return {"batch": self.number, "stage": self.stage, "step": self.run.step, "rows": self.call.num_rows}

    def note_stage(self, started: Mark, ended: Mark) -> None:
        """Count a finished stage, and record it if a recorder is on."""
        here = self.here
        profiler.meter().count_stage_run(here.slot)
        if not profiler.recorder().is_on:
            return
        count = len(self.route.stages)
        kind, name = ("network", "whole network") if count == 1 else ("stage", f"stage {self.stage + 1} of {count}")
        self._note(kind, name, here.slot, here.device, started, ended)

    def note_part(self, started: Mark, ended: Mark) -> None:
        """Record the part of a stage that ran before its rows waited for residuals."""
        self._note("stage", "before residuals", self.here.slot, self.here.device, started, ended)

    def note_control(self, slot: int, device: torch.device, started: Mark, ended: Mark) -> None:
        """Record a ControlNet's pass for these rows."""
        self._note("ControlNet", "ControlNet", slot, device, started, ended)

    def _note(self, kind: str, name: str, slot: int, device: torch.device, started: Mark, ended: Mark) -> None:
        recorder = profiler.recorder()
        if recorder.is_on:
            recorder.add(started, ended, devices=(device, device), kind=kind, name=name, slot=slot, **self.facts())
