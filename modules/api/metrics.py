"""GET /metrics: jobs, waiting and running times, and every slot, in the text format that Prometheus reads. On a cluster's front also the workers'.

Labels contain names of machines and devices, never prompts or users.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import Response

from modules.jobs.meter import BOUNDS_S, Histogram

if TYPE_CHECKING:
    from modules.application import Application

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "webui_"
Sample = tuple[Mapping[str, str], float]


class MetricsRoutes:
    """One method per route."""

    def __init__(self, app: Application) -> None:
        self.app = app

    def metrics(self) -> Response:
        """All metrics as text."""
        return Response("\n".join(self._lines()) + "\n", headers={"Content-Type": CONTENT_TYPE})

    def _lines(self) -> Iterator[str]:
        jobs = self.app.jobs
        ended = [({"outcome": outcome}, float(count)) for outcome, count in sorted(jobs.meter.num_ended.items())]
        yield from metric("jobs_ended_total", "counter", "Jobs that ended, by outcome.", ended)
        yield from metric("jobs_refused_total", "counter", "Jobs refused because the queue was full.", [({}, jobs.meter.num_refused)])
        yield from metric("jobs_waiting", "gauge", "Jobs in the queue.", [({}, jobs.num_waiting)])
        yield from metric("jobs_running", "gauge", "Jobs that run.", [({}, jobs.num_running)])
        yield from histogram("job_wait_seconds", "Time from acceptance to start.", jobs.meter.wait_s)
        yield from histogram("job_run_seconds", "Time from start to end.", jobs.meter.run_s)
        yield from self._slots()
        if self.app.remote_engine is not None:
            yield from self._workers(self.app.remote_engine.describe())

    def _slots(self) -> Iterator[str]:
        from backend.parallel.running import status  # imports torch; only for this report

        slots = [_slot_facts(slot.index, slot.torch_device, slot) for slot in status.describe_slots()]
        plan = status.current_plan()
        yield from slot_metrics("slot", slots)
        if plan is not None and plan.measured_ms:
            yield from metric("step_milliseconds", "gauge", "Measured time of a sampling step with the current plan.", [({}, plan.measured_ms)])

    def _workers(self, described: Mapping[str, Any]) -> Iterator[str]:
        workers = described["workers"]
        labels = [{"worker": worker["worker"], "machine": worker["machine"]} for worker in workers]

        def per_worker(name: str, kind: str, text: str, key: str) -> Iterator[str]:
            return metric(name, kind, text, [(label, worker[key]) for label, worker in zip(labels, workers) if worker[key] is not None])

        yield from metric("cluster_pieces_waiting", "gauge", "Pieces of jobs that wait for a worker.", [({}, described["waiting"])])
        yield from metric("cluster_retries_total", "counter", "Pieces made again because a worker was lost.", [({}, described["retries"])])
        yield from metric("cluster_loads_total", "counter", "Jobs that were given to a worker without their checkpoint.", [({}, described["loads"])])
        states = [({**label, "state": worker["state"]}, 1.0) for label, worker in zip(labels, workers)]
        yield from metric("worker_state", "gauge", "1 for the state that a worker is in.", states)
        yield from per_worker("worker_orders_done_total", "counter", "Orders that a worker has done since it started.", "done")
        yield from per_worker("worker_busy_seconds_total", "counter", "Time that a worker's orders took there.", "busy_s")
        yield from per_worker("worker_megapixel_steps_per_second", "gauge", "Measured speed of a worker.", "speed")
        yield from per_worker("worker_step_milliseconds", "gauge", "Measured time of a sampling step on a worker.", "step_ms")
        yield from per_worker("worker_free_disk_bytes", "gauge", "Free disk where a worker keeps model files.", "free_disk_bytes")
        slots = [
            ({**label, "slot": str(slot["index"]), "device": slot["device"]}, slot)
            for label, worker in zip(labels, workers)
            for slot in worker["slots"]
        ]
        yield from slot_metrics("worker_slot", slots)


def _slot_facts(index: int, device: str, slot: Any) -> tuple[dict[str, str], dict[str, Any]]:
    return {"slot": str(index), "device": device}, {name: getattr(slot, name) for name in ("total_bytes", "free_bytes", "utilization")}


def slot_metrics(prefix: str, slots: Iterable[tuple[Mapping[str, str], Mapping[str, Any]]]) -> Iterator[str]:
    """Memory and use of slots."""
    known = list(slots)
    for key, name, text in (
        ("total_bytes", "memory_total_bytes", "Memory of a slot."),
        ("free_bytes", "memory_free_bytes", "Free memory of a slot."),
        ("utilization", "utilization_percent", "How busy a slot is."),
    ):
        yield from metric(f"{prefix}_{name}", "gauge", text, [(labels, slot[key]) for labels, slot in known if slot[key] is not None])


def metric(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    """A metric with its samples; nothing if there are none."""
    lines = [f"{PREFIX}{name}{_labels(labels)} {_number(value)}" for labels, value in samples]
    if lines:
        yield f"# HELP {PREFIX}{name} {text}"
        yield f"# TYPE {PREFIX}{name} {kind}"
        yield from lines


def histogram(name: str, text: str, times: Histogram) -> Iterator[str]:
    """A histogram of times in seconds."""
    counts = times.cumulative()
    yield f"# HELP {PREFIX}{name} {text}"
    yield f"# TYPE {PREFIX}{name} histogram"
    for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), counts):
        yield f'{PREFIX}{name}_bucket{{le="{bound}"}} {count}'
    yield f"{PREFIX}{name}_sum {_number(times.sum_s)}"
    yield f"{PREFIX}{name}_count {counts[-1]}"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return repr(int(value)) if float(value).is_integer() else repr(float(value))
