"""Workers as the front sees them: a few calls that each may fail because the worker is gone. `ray_serve` has the real fleet, tests have others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from modules.cluster.values import MessageError, unpack
from modules.errors import RequestError


class WorkerLostError(Exception):
    """The worker died, or did not answer in time."""


class WorkerRefusesError(Exception):
    """The worker cannot do this order, but another may."""


class ClusterError(RequestError):
    """The cluster cannot do the job. Not the client's mistake."""

    status = 503
    retry_after_s = 30


class OutOfMemoryError(RuntimeError):
    """A worker ran out of memory; the API answers as if it had happened here."""


class Fleet(Protocol):
    """Calls block their thread. Except `reports`, each raises WorkerLostError if the worker is gone."""

    def reports(self) -> Sequence[Any]:
        """What the workers that answer say about themselves; see modules.cluster.reports."""

    def start(self, worker: str, order_id: str, message: bytes) -> Mapping[str, Any]:
        """Hand over an order; again with the same id changes nothing. {"missing": [...]}: files that the worker needs first."""

    def follow(self, worker: str, order_id: str, known_preview: int) -> Mapping[str, Any]:
        """How the order is going; answers when it has ended, else after a moment."""

    def control(self, worker: str, order_id: str, action: str) -> None:
        """`action`: "interrupt", "skip", "stop" (after the current batch) or "forget" (the outcome has been read)."""

    def send_part(self, worker: str, file: Mapping[str, Any], offset: int, data: bytes) -> Mapping[str, Any]:
        """Write a part of a model file; see modules.cluster.files."""

    def num_places(self) -> int:
        """How many workers the machines that are connected now could hold."""

    def resize(self, num_workers: int) -> None:
        """Have this many workers, as far as machines allow. Workers that are no longer wanted end their jobs first."""

    def close(self) -> None:
        """Let go of the workers. They stay, for the next front."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How an order is going, as counters of `modules.jobs.state.State`."""

    job_no: int = 0
    job_count: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0
    preview_id: int = -1
    preview: Image.Image | None = None
    is_done: bool = False
    outcome: bytes | None = None

    @property
    def share(self) -> float:
        """Batches done, with the share of the running one; 2.5 of `job_count` 4."""
        step = min(1.0, self.sampling_step / self.sampling_steps) if self.sampling_steps else 0.0
        return min(float(max(1, self.job_count)), self.job_no + step)


def check_answer(raw: Any) -> Mapping[str, Any]:
    """The answer of a worker. Raises MessageError if it is none, and the error that it reports: RequestError, OutOfMemoryError,
    WorkerRefusesError, WorkerLostError or RuntimeError."""
    if not isinstance(raw, Mapping):
        raise MessageError(f"worker: expected a mapping, got {type(raw).__name__}.")
    if (error := raw.get("error")) is not None:
        raise _error_of(error)
    return raw


def read_progress(raw: Any) -> Progress:
    """Raises as check_answer."""
    raw = check_answer(raw)
    names = ("job_no", "job_count", "sampling_step", "sampling_steps", "preview_id")
    counters = {name: min(max(int(raw.get(name) or 0), -1), 1_000_000_000) for name in names if isinstance(raw.get(name), int)}
    outcome, preview = raw.get("outcome"), raw.get("preview")
    return Progress(
        **counters,
        preview=_picture(preview) if isinstance(preview, bytes) else None,
        is_done=isinstance(outcome, bytes),
        outcome=outcome if isinstance(outcome, bytes) else None,
    )


def _picture(message: bytes) -> Image.Image | None:
    picture = unpack(message, what="preview", types={})
    return picture if isinstance(picture, Image.Image) else None


def _error_of(error: Any) -> Exception:
    facts: Mapping[str, Any] = error if isinstance(error, Mapping) else {}
    text = str(facts.get("text"))[:20_000]
    kind = facts.get("kind")
    if kind == "request":
        found = RequestError(text)
        status = facts.get("status")
        found.status = status if isinstance(status, int) and 400 <= status < 600 else 422
        return found
    if kind == "memory":
        return OutOfMemoryError(text)
    if kind == "refused":
        return WorkerRefusesError(text)
    return WorkerLostError(text) if kind == "lost" else RuntimeError(text)
