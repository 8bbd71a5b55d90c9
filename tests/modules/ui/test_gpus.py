from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest

from backend.parallel.running.status import PlanStatus, SlotStatus
from modules.application import Application
from modules.ui import gpus
from tests.support.applications import installed_application

GIB = 2**30
SLOT = SlotStatus(
    index=1, name="Card <XL>", torch_device="cuda:1", vram_state="LOW_VRAM", total_bytes=24 * GIB, free_bytes=6 * GIB, resident_bytes=12 * GIB,
    peak_bytes=20 * GIB, speed=0.6, utilization=97, temperature=66, power=300.0, holders=(("KModel", 10 * GIB), ("VAE & more", 2 * GIB)),
)  # fmt: skip
PLAN = PlanStatus(
    strategy="replicas", reason="each card has a copy, 1.9x", replicas=2, stages=((0,), (1,)), rows=(1, 1), predicted_ms=100.4, measured_ms=None,
    predicted_bytes={},
)  # fmt: skip


def test_a_slot_shows_its_name_memory_holders_use_and_temperature() -> None:
    text = gpus.slots_html([SLOT])
    for part in ("Card &lt;XL&gt;", "cuda:1, low VRAM", "KModel 10240 MiB", "VAE &amp; more 2048 MiB", "97 %", "66 °C"):
        assert part in text
    for part in ("18.0 of 24.0 GiB", "width:75.0%", "width:50.0%", "12.0 GiB of models, at most 20.0 GiB so far"):
        assert part in text


def test_what_nobody_tells_has_no_column_and_what_one_does_not_tell_is_a_dash() -> None:
    silent = replace(SLOT, utilization=None, temperature=None, peak_bytes=None, holders=())
    alone, beside = gpus.slots_html([silent]), gpus.slots_html([SLOT, silent])
    assert (alone.count("–"), beside.count("–")) == (1, 3)
    assert (alone.count("<th>"), beside.count("<th>")) == (4, 6)
    assert "so far" not in alone


def test_the_plan_is_a_sentence() -> None:
    assert gpus.plan_html(PLAN) == "<p class='plan'>each card has a copy, 1.9x; 100 ms a step predicted.</p>"
    assert "92 ms a step measured" in gpus.plan_html(replace(PLAN, measured_ms=92.0, reason="a < b."))
    assert "a &lt; b;" in gpus.plan_html(replace(PLAN, measured_ms=92.0, reason="a < b."))
    assert "No plan yet" in gpus.plan_html(None)


def test_a_panel_refreshes_while_a_job_runs_and_once_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def status_html(app: Application, *, is_busy: bool) -> str:
        asked.append(is_busy)
        return "shown" if is_busy else f"shown{gpus.idle_mark(app)}"

    monkeypatch.setattr(gpus, "status_html", status_html)
    with installed_application(tmp_path) as app, gr.Blocks(analytics_enabled=False) as page:
        gpus.create_gpu_panel(app, "txt2img")
        handlers = {target[1]: fn.fn for fn in page.fns.values() for target in fn.targets}
        shown, _ = handlers["expand"]()
        assert handlers["tick"](shown) == gr.skip()
        app.state.begin("job")
        shown = handlers["tick"](shown)
        assert handlers["tick"](shown) == "shown"
        app.state.end()
        shown = handlers["tick"](shown)
        assert handlers["tick"](shown) == gr.skip()
        app.state.begin("a job shorter than the pause between two ticks")
        app.state.end()
        shown = handlers["tick"](shown)
        assert handlers["tick"](shown) == gr.skip()
    assert asked == [False, True, True, False, False]


def test_the_real_status_can_be_shown(tmp_path: Path) -> None:
    with installed_application(tmp_path) as app:
        assert "<table>" in gpus.status_html(app, is_busy=False)
