"""The "GPUs" panel of a generation tab: what every compute place holds and does, and the plan in one sentence.

It is filled when it is opened and, while it is open, every other second of a running job. It must not know how plans are made.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

if TYPE_CHECKING:
    from backend.parallel.status import PlanStatus, SlotStatus
    from modules.application import Application

REFRESH_S = 2
_NOTHING_RUNS = "<div hidden class='idle'></div>"
_UNKNOWN = "–"
_STATES = {
    "DISABLED": "main memory",
    "NO_VRAM": "no VRAM to spare",
    "LOW_VRAM": "low VRAM",
    "NORMAL_VRAM": "normal",
    "HIGH_VRAM": "all stays",
    "SHARED": "shared memory",
    "LOST": "lost",
}
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


def create_gpu_panel(app: Application, tab: str) -> gr.Accordion:
    """Build the panel inside the current gradio context, and connect it."""
    with gr.Accordion("GPUs", open=False, elem_id=f"{tab}_gpus") as panel:
        table = gr.HTML(elem_id=f"{tab}_gpus_table", elem_classes=["gpus"])
    clock = gr.Timer(REFRESH_S, active=False)

    def open_panel() -> list[Any]:
        return [status_html(is_busy=is_busy(app)), gr.Timer(active=True)]

    def refresh(shown: str | None) -> Any:
        busy = is_busy(app)
        if not busy and _NOTHING_RUNS in (shown or ""):
            return gr.skip()
        return status_html(is_busy=busy)

    panel.expand(open_panel, outputs=[table, clock], **QUIET)
    panel.collapse(lambda: gr.Timer(active=False), outputs=[clock], **QUIET)
    clock.tick(refresh, inputs=[table], outputs=[table], **QUIET)
    return panel


def is_busy(app: Application) -> bool:
    """Whether a job runs."""
    return bool(app.state.job)


def status_html(*, is_busy: bool) -> str:
    """The panel's content now."""
    from backend.parallel import status  # imports torch, which the page does without until somebody looks

    text = f"{plan_html(status.current_plan())}{slots_html(status.describe_slots())}"
    return text if is_busy else text + _NOTHING_RUNS


def plan_html(plan: PlanStatus | None) -> str:
    """The plan in a sentence."""
    if plan is None:
        return "<p class='plan'>No plan yet: the first picture makes one.</p>"
    times = [f"{ms:.0f} ms a step {word}" for ms, word in ((plan.predicted_ms, "predicted"), (plan.measured_ms, "measured")) if ms]
    return f"<p class='plan'>{html.escape('; '.join([plan.reason.rstrip('.'), *times]))}.</p>"


def slots_html(slots: Sequence[SlotStatus]) -> str:
    """A row for every slot; what no slot tells has no column."""
    columns = [column for column in _COLUMNS if column[0] not in ("Use", "Temp.") or any(column[1](slot) != _UNKNOWN for slot in slots)]
    head = "".join(f"<th>{name}</th>" for name, _ in columns)
    rows = "".join("<tr>" + "".join(f"<td>{show(slot)}</td>" for _, show in columns) + "</tr>" for slot in slots)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _device(slot: SlotStatus) -> str:
    return f"{html.escape(slot.name)}<small>{html.escape(slot.torch_device)}, {_STATES.get(slot.vram_state, slot.vram_state)}</small>"


def _memory_bar(slot: SlotStatus) -> str:
    """Used of total, with the part that models take set off."""
    total_bytes = max(1, slot.total_bytes)
    used_bytes = max(0, slot.total_bytes - slot.free_bytes)
    used, models = (min(100.0, 100 * part_bytes / total_bytes) for part_bytes in (used_bytes, min(slot.resident_bytes, used_bytes)))
    words = f"{_gib(used_bytes)} of {_gib(slot.total_bytes)} GiB"
    peak = "" if slot.peak_bytes is None else f", at most {_gib(slot.peak_bytes)} GiB so far"
    bar = f"<div class='bar'><i style='width:{used:.1f}%'></i><b style='width:{models:.1f}%'></b></div>"
    return f"<div title='{_gib(slot.resident_bytes)} GiB of models{peak}'>{bar}<small>{words}</small></div>"


def _holders(slot: SlotStatus) -> str:
    return "".join(f"<div class='held'>{html.escape(name)} {held_bytes / 2**20:.0f} MiB</div>" for name, held_bytes in slot.holders) or _UNKNOWN


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
