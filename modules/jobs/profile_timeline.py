"""A picture of a job's time: one lane per slot, colored by kind of work, with copies to the slot as a thin line below it."""

from __future__ import annotations

import io
import textwrap

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from modules.jobs.profile_record import TITLE, JobRecord

COLORS = {
    "network": "#3b7dd8",
    "stage": "#3b7dd8",
    "text encoder": "#9467bd",
    "ControlNet": "#e08f1f",
    "VAE": "#2a9d5c",
    "plan": "#7f7f7f",
    "load": "#8c6d5a",
    "save": "#c7a26b",
    "copy": "#d1495b",
}
_NAMES = {"stage": "network"}
_WIDTH_IN, _LANE_IN, _DPI = 11.0, 0.62, 110


def draw_timeline(job: JobRecord) -> bytes:
    """A PNG of the job."""
    lanes = [*(slot.slot for slot in job.slots), None]
    figure = Figure(figsize=(_WIDTH_IN, 1.75 + _LANE_IN * len(lanes)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, lane in enumerate(lanes):
        for kind, color in COLORS.items():
            bars = [(span.start_ms / 1000, (span.end_ms - span.start_ms) / 1000) for span in job.spans if span.slot == lane and span.kind == kind]
            low, height = (place + 0.28, 0.1) if kind == "copy" else (place - 0.32, 0.56)
            axes.broken_barh(bars, (low, height), facecolors=color, edgecolor="white" if kind != "copy" else color, linewidth=0.15)
    axes.set_yticks(range(len(lanes)), [_lane_label(job, lane) for lane in lanes])
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_xlim(0, max(job.wall_ms / 1000, 1e-3))
    axes.set_xlabel("seconds since the job started")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title(_title(job), loc="left", fontsize=9)
    axes.legend(handles=_legend(job), loc="upper center", bbox_to_anchor=(0.5, -0.26 - 0.2 / len(lanes)), ncols=7, frameon=False, fontsize=8)
    written = io.BytesIO()
    figure.savefig(written, format="png", metadata={"Title": TITLE})
    return written.getvalue()


def _lane_label(job: JobRecord, lane: int | None) -> str:
    if lane is None:
        return "host"
    slot = next(slot for slot in job.slots if slot.slot == lane)
    return f"slot {slot.slot}: {textwrap.shorten(slot.name, 24, placeholder='…')}\n{slot.device}, {slot.busy_share:.0%} busy"


def _title(job: JobRecord) -> str:
    request = job.request
    pictures = request.batch_size * request.batch_count
    size = f"{request.width_px}x{request.height_px}"
    what = f"{request.kind}, {pictures} of {size}, {request.sampler}, {request.steps} steps: {job.wall_ms / 1000:.2f} s, {job.outcome}"
    plan = f"{job.plans[-1].strategy}: {job.plans[-1].reason}" if job.plans else "no plan was made"
    return f"{what}\n{textwrap.fill(plan, 150)}"


def _legend(job: JobRecord) -> list[Patch]:
    """One legend entry per kind that occurs."""
    kinds = dict.fromkeys(_NAMES.get(span.kind, span.kind) for span in job.spans)
    colors = {_NAMES.get(kind, kind): color for kind, color in COLORS.items()}
    return [Patch(color=color, label=name) for name, color in colors.items() if name in kinds]
