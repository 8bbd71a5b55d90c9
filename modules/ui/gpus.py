"""The "GPUs" panel of a generation tab: what each slot holds and does, and the plan in one sentence.

It is filled when opened. While it is open and a job runs, it refreshes every other second. It must not know how plans are made.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from modules.jobs.gpu_report import STATES, describe_idleness
from modules.jobs.profile_files import TIMELINE, own_place

if TYPE_CHECKING:
    from backend.parallel.running.status import PlanStatus, SlotStatus
    from modules.application import Application

REFRESH_S = 2
_UNKNOWN = "–"
_DONE = "Stage runs"
_OPTIONAL = ("Use", "Temp.", _DONE)
LOG_FOLDER = "logs"
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


def create_gpu_panel(app: Application, tab: str) -> gr.Accordion:
    """Build the panel inside the current gradio context, and connect it."""
    with gr.Accordion("GPUs", open=False, elem_id=f"{tab}_gpus") as panel:
        table = gr.HTML(elem_id=f"{tab}_gpus_table", elem_classes=["gpus"])
    clock = gr.Timer(REFRESH_S, active=False)

    def open_panel() -> list[Any]:
        return [status_html(app, is_busy=is_busy(app)), gr.Timer(active=True)]

    def refresh(shown: str | None) -> Any:
        busy = is_busy(app)
        if not busy and idle_mark(app) in (shown or ""):
            return gr.skip()
        return status_html(app, is_busy=busy)

    panel.expand(open_panel, outputs=[table, clock], **QUIET)
    panel.collapse(lambda: gr.Timer(active=False), outputs=[clock], **QUIET)
    clock.tick(refresh, inputs=[table], outputs=[table], **QUIET)
    return panel


def is_busy(app: Application) -> bool:
    """Whether a job is running."""
    return bool(app.state.job)


def idle_mark(app: Application) -> str:
    """Says which job was the last when nothing ran. So a job that began and ended between two looks is noticed too."""
    return f"<div hidden class='idle' data-after='{app.state.time_start or 0}'></div>"


def status_html(app: Application, *, is_busy: bool) -> str:
    """The panel's content: the plan and the slots; when idle also a hint for using an idle slot, and the last job's timeline."""
    from backend import profiler  # imports torch, which the page avoids until the panel is opened
    from backend.parallel.running import status

    if app.remote_engine is not None:
        return f"{workers_html(app.remote_engine.describe())}{'' if is_busy else idle_mark(app)}"
    plan, slots = status.current_plan(), status.describe_slots()
    text = f"{plan_html(plan)}{slots_html(slots, profiler.meter().stage_runs)}"
    if is_busy:
        return text
    advice = describe_idleness(plan, slots, uses_many=app.config.backend.multi_gpu, job=app.last_profile)
    return "".join([text, f"<p class='advice'>{html.escape(advice)}</p>" if advice else "", timeline_html(app), idle_mark(app)])


def workers_html(described: Mapping[str, Any]) -> str:
    """Machines, their workers and slots, on the front of a cluster."""
    workers = described["workers"]
    if not workers:
        return "<p class='plan'>No worker is connected. On each machine with GPUs run: python -m modules.cluster worker --address HEAD</p>"
    busy = sum(worker["state"] == "busy" for worker in workers)
    waiting = f"; {described['waiting']} wait for one" if described["waiting"] else ""
    head = "".join(f"<th>{name}</th>" for name in ("Machine", "Worker", "State", "Model", "Slot", "Memory", "Use"))
    rows = "".join(_worker_rows(worker) for worker in workers)
    return (
        f"<p class='plan'>{busy} of {len(workers)} workers are busy{waiting}.</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _worker_rows(worker: Mapping[str, Any]) -> str:
    """A row per slot; what is about the worker is in the first."""
    state = f"{worker['state']}<small>{html.escape(worker['reason'])}</small>"
    model = f"{html.escape(worker['checkpoint'] or _UNKNOWN)}<small>{html.escape(', '.join(worker['networks']))}</small>"
    own = [html.escape(worker["machine"]), html.escape(worker["worker"]), state, model]
    slots = worker["slots"] or [None]
    rows = []
    for number, slot in enumerate(slots):
        cells = [*(own if number == 0 else [""] * len(own)), *(["", "", ""] if slot is None else _slot_cells(slot))]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "".join(rows)


def _slot_cells(slot: Mapping[str, Any]) -> list[str]:
    device = f"{html.escape(slot['name'])}<small>{html.escape(slot['device'])}</small>"
    used_bytes, total_bytes = slot["total_bytes"] - slot["free_bytes"], max(1, slot["total_bytes"])
    words = f"{_gib(used_bytes)} of {_gib(slot['total_bytes'])} GiB"
    bar = f"<div class='bar'><i style='width:{100 * used_bytes / total_bytes:.1f}%'></i></div><small>{words}</small>"
    return [device, bar, _number(slot["utilization"], " %")]


def timeline_html(app: Application) -> str:
    """The timeline picture of the last job; empty without --profile."""
    if not app.config.backend.profile:
        return ""
    try:
        picture = own_place(app.config.data_dir / LOG_FOLDER, TIMELINE).read_bytes()
    except OSError:  # no job yet, or it was deleted
        return ""
    coded = base64.b64encode(picture).decode()
    return f"<img class='timeline' alt='What each slot did in the last job' src='data:image/png;base64,{coded}'>"


def plan_html(plan: PlanStatus | None) -> str:
    """The plan in one sentence."""
    if plan is None:
        return "<p class='plan'>No plan yet: the first picture makes one.</p>"
    times = [f"{ms:.0f} ms a step {word}" for ms, word in ((plan.predicted_ms, "predicted"), (plan.measured_ms, "measured")) if ms]
    return f"<p class='plan'>{html.escape('; '.join([plan.reason.rstrip('.'), *times]))}.</p>"


def slots_html(slots: Sequence[SlotStatus], stage_runs: Mapping[int, int] | None = None) -> str:
    """One row per slot; a column that no slot has a value for is left out. `stage_runs`: runs per slot in the running or last job."""
    done = stage_runs or {}
    all_columns = (*_COLUMNS, (_DONE, lambda slot: _stage_runs_bar(done.get(slot.index, 0), done)))
    columns = [column for column in all_columns if column[0] not in _OPTIONAL or any(column[1](slot) != _UNKNOWN for slot in slots)]
    head = "".join(f"<th>{name}</th>" for name, _ in columns)
    rows = "".join("<tr>" + "".join(f"<td>{show(slot)}</td>" for _, show in columns) + "</tr>" for slot in slots)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _device(slot: SlotStatus) -> str:
    return f"{html.escape(slot.name)}<small>{html.escape(slot.torch_device)}, {STATES.get(slot.vram_state, slot.vram_state)}</small>"


def _memory_bar(slot: SlotStatus) -> str:
    """Used bytes of total bytes, with the share of models highlighted."""
    total_bytes = max(1, slot.total_bytes)
    used_bytes = max(0, slot.total_bytes - slot.free_bytes)
    used, models = (min(100.0, 100 * part_bytes / total_bytes) for part_bytes in (used_bytes, min(slot.resident_bytes, used_bytes)))
    words = f"{_gib(used_bytes)} of {_gib(slot.total_bytes)} GiB"
    peak = "" if slot.peak_bytes is None else f", at most {_gib(slot.peak_bytes)} GiB so far"
    bar = f"<div class='bar'><i style='width:{used:.1f}%'></i><b style='width:{models:.1f}%'></b></div>"
    return f"<div title='{_gib(slot.resident_bytes)} GiB of models{peak}'>{bar}<small>{words}</small></div>"


def _holders(slot: SlotStatus) -> str:
    return "".join(f"<div class='held'>{html.escape(name)} {held_bytes / 2**20:.0f} MiB</div>" for name, held_bytes in slot.holders) or _UNKNOWN


def _stage_runs_bar(num_runs: int, stage_runs: Mapping[int, int]) -> str:
    """How often the slot ran its stage, relative to the busiest slot."""
    most = max(stage_runs.values(), default=0)
    if most == 0:
        return _UNKNOWN
    return f"<div class='bar'><b style='width:{100 * num_runs / most:.1f}%'></b></div><small>{num_runs}</small>"


def _number(value: float | None, unit: str) -> str:
    return _UNKNOWN if value is None else f"{value:.0f}{unit}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f}" if size_bytes >= 2**30 // 10 else f"{size_bytes / 2**30:.2f}"


_COLUMNS: tuple[tuple[str, Callable[[SlotStatus], str]], ...] = (
    ("", lambda slot: str(slot.index)),
    ("Device", _device),
    ("Memory", _memory_bar),
    ("Models on it", _holders),
    ("Use", lambda slot: _number(slot.utilization, " %")),
    ("Temp.", lambda slot: _number(slot.temperature, " °C")),
)
