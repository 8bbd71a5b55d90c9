from __future__ import annotations

import json
from pathlib import Path

import pytest

from backend.profiler import Recording, Span
from modules.jobs import profile_files
from modules.jobs.profile_files import JOBS_PER_FILE, NUM_OLD_FILES, chrome_trace, read_profile, write_profile
from modules.jobs.profile_record import TITLE, JobFacts, JobRecord, PeakRecord, RequestRecord, SampleRecord, SlotFigures, build_job
from modules.jobs.profile_timeline import draw_timeline

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "profile.md"


def make_job(number: int = 0) -> JobRecord:
    """Two slots for 100 ms; the second gets a copy and then computes."""
    ms = 1_000_000
    spans = (
        Span(kind="network", name="whole network", slot=0, start_ns=10 * ms, end_ns=60 * ms, batch=0, step=0, rows=1),
        Span(kind="copy", name="copy", slot=1, start_ns=12 * ms, end_ns=20 * ms, num_bytes=4096, link="cuda:0 > cuda:1"),
        Span(kind="network", name="whole network", slot=1, start_ns=20 * ms, end_ns=90 * ms, batch=1, step=0, rows=1),
        Span(kind="save", name="save a picture", slot=None, start_ns=91 * ms, end_ns=95 * ms),
    )
    request = RequestRecord(
        kind="txt2img", model="m", width_px=64, height_px=64, steps=1, sampler="Euler", scheduler="Karras", cfg_scale=4.0, batch_size=1,
        batch_count=1,
        hires=False,
    )  # fmt: skip
    nothing = PeakRecord(allocated_bytes=None, reserved_bytes=None, driver_bytes=None)
    samples = [
        SampleRecord(at_ms=at_ms, slot=1, utilization_percent=percent, used_bytes=5, power_watts=None, temperature_celsius=None)
        for at_ms, percent in ((0.0, 40), (50.0, 60), (90.0, None))
    ]
    facts = JobFacts(
        id=f"job-{number}", started_at="2026-01-01T00:00:00+00:00", outcome="finished", error=None, request=request, samples=samples,
        slots=[SlotFigures(slot=index, name=f"card {index}", device=f"cuda:{index}", peak=nothing) for index in (0, 1)],
    )  # fmt: skip
    return build_job(Recording(start_ns=0, end_ns=100 * ms, spans=spans, step_ends_ns=(90 * ms,), plans=((0, None),), num_dropped=0), facts)


def test_a_record_has_what_the_spans_say() -> None:
    job = make_job()
    first, second = job.slots
    assert (first.busy_ms, first.busy_share, first.wait_ms_by_cause) == (50.0, 0.5, {"other slots": 30.0, "host": 16.0, "save": 4.0})
    assert (second.busy_ms, second.wait_ms_by_cause) == (70.0, {"copy": 8.0, "other slots": 2.0, "host": 16.0, "save": 4.0})
    assert (first.driver_utilization_percent, second.driver_utilization_percent) == (None, 50.0)
    assert (job.communication.exposed_share, job.links[0].bytes, job.steps[0].host_end_ms) == (1.0, 4096, 90.0)
    assert [(batch.batch, batch.slots) for batch in job.batches] == [(0, [0]), (1, [1])]


PICTURE = b"\x89PNG and so on, " + TITLE.encode()


def test_only_the_last_jobs_are_kept_and_older_files_rotate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.jobs.profile_timeline.draw_timeline", lambda job: PICTURE)
    for number in range(JOBS_PER_FILE * (NUM_OLD_FILES + 2) + 1):
        write_profile(tmp_path, make_job(number))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["profile.1.json", "profile.2.json", "profile.3.json", "profile.json", "timeline.png", "trace.json"]
    newest, before = read_profile(tmp_path / "profile.json"), read_profile(tmp_path / "profile.1.json")
    assert newest is not None
    assert before is not None
    assert [job.id for job in newest.jobs] == [f"job-{JOBS_PER_FILE * (NUM_OLD_FILES + 2)}"]
    assert before.jobs[-1].id == f"job-{JOBS_PER_FILE * (NUM_OLD_FILES + 2) - 1}"


@pytest.mark.parametrize("content", ['{"version": 99, "program": "x", "jobs": []}', '{"version": 1, "program": "x", "jobs": [{}]}'])
def test_a_file_of_another_version_is_put_aside(tmp_path: Path, content: str) -> None:
    (tmp_path / "profile.json").write_text(content)
    write_profile(tmp_path, make_job())
    assert (tmp_path / "profile.1.json").read_text() == content
    written = read_profile(tmp_path / "profile.json")
    assert written is not None
    assert written.jobs == [make_job()]


@pytest.mark.parametrize("content", ["", "{", '{"name": "somebody", "jobs": []}'])
def test_files_that_no_profile_wrote_keep_their_place_and_their_name(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.jobs.profile_timeline.draw_timeline", lambda job: PICTURE)
    names = ("profile.json", "webui-profile.2.json", "trace.json", "timeline.png")
    for name in names:
        (tmp_path / name).write_text(content)
    (tmp_path / "webui-trace.json").mkdir()
    for number in range(JOBS_PER_FILE * (NUM_OLD_FILES + 2) + 1):
        write_profile(tmp_path, make_job(number))
    assert {name: (tmp_path / name).read_text() for name in names} == dict.fromkeys(names, content)
    assert sorted({path.name for path in tmp_path.iterdir()} - set(names)) == [
        *("webui-profile.1.json", "webui-profile.3.json", "webui-profile.json"),
        *("webui-timeline.png", "webui-trace.json", "webui-webui-trace.json"),
    ]
    newest, older = (read_profile(tmp_path / f"webui-profile.{middle}json") for middle in ("", "3."))
    assert newest is not None and older is not None
    last = JOBS_PER_FILE * (NUM_OLD_FILES + 2)
    assert (newest.jobs[-1].id, older.jobs[-1].id) == (f"job-{last}", f"job-{last - 1 - JOBS_PER_FILE}")


def test_the_trace_has_a_thread_for_each_slot_and_its_copies() -> None:
    trace = json.loads(json.dumps(chrome_trace(make_job())))
    named = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert {"host", "slot 0: card 0", "copies to slot 1: card 1"} <= set(named.values())
    assert len(named) == 6
    (copy,) = [event for event in trace["traceEvents"] if event.get("cat") == "copy"]
    assert (copy["ts"], copy["dur"], copy["args"]) == (12000.0, 8000.0, {"bytes": 4096, "link": "cuda:0 > cuda:1"})
    assert named[copy["tid"]] == "copies to slot 1: card 1"
    waits = [event for event in trace["traceEvents"] if event.get("cat") == "wait" and event["tid"] == 4]
    assert sum(event["dur"] for event in waits) == pytest.approx(30_000)
    assert [event["args"]["use"] for event in trace["traceEvents"] if event["ph"] == "C"] == [40, 60]


def test_the_timeline_is_a_picture_without_a_screen() -> None:
    png = draw_timeline(make_job())
    assert png.startswith(b"\x89PNG") and TITLE.encode() in png[:1024]
    empty = make_job().model_copy(update={"spans": [], "plans": [], "slots": []})
    assert draw_timeline(empty).startswith(b"\x89PNG")


def test_every_field_is_documented() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")

    def names(schema: object) -> set[str]:
        if isinstance(schema, dict):
            found = set(schema.get("properties", {}))
            return found.union(*(names(value) for value in schema.values()))
        return set().union(*map(names, schema)) if isinstance(schema, list) else set()

    missing = {name for name in names(profile_files.ProfileFile.model_json_schema()) if f"`{name}`" not in text}
    assert missing == set()
