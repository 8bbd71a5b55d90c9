"""Files that --profile writes to logs/: profile.json with the last jobs, trace.json and timeline.png of the last one. Knows no devices or requests.

Each file is replaced as a whole, so that a crash leaves the previous one. A file with that name that is not a profile is never replaced or renamed;
ours is then called webui-profile.json, and so on.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from backend.unfinished_files import replace_content
from modules.jobs.profile_record import TITLE, JobRecord, ProfileFile
from modules.launch.version import program_version

log = logging.getLogger(__name__)

PROFILE, TRACE, TIMELINE = "profile.json", "trace.json", "timeline.png"
JOBS_PER_FILE = 10
NUM_OLD_FILES = 3
_HEAD_BYTES = 1024
_BEGINNINGS = {
    ".json": re.compile(rb'\s*\{\s*"(version":\s*\d+,\s*"program"|displayTimeUnit":"ms","otherData":\{"job"):'),
    ".png": re.compile(rb"\x89PNG.*" + TITLE.encode(), re.DOTALL),
}


def write_profile(folder: Path, job: JobRecord) -> None:
    """Add a job to profile.json, and write its trace and its timeline. Raises: OSError."""
    from modules.jobs.profile_timeline import draw_timeline  # imports matplotlib

    _add_job(own_place(folder, PROFILE), job)
    replace_content(own_place(folder, TRACE), json.dumps(chrome_trace(job), separators=(",", ":")).encode())
    replace_content(own_place(folder, TIMELINE), draw_timeline(job))


def own_place(folder: Path, name: str) -> Path:
    """Where the profile's file `name` goes: under its name, or with the prefix `webui-` while something else has that name."""
    path = folder / name
    while path.exists() and not is_ours(path):
        log.info("%s is not a profile of this program and stays; the profile is called webui-%s.", path, path.name)
        path = path.with_name(f"webui-{path.name}")
    return path


def is_ours(path: Path) -> bool:
    """Whether this file is a profile, of any version, judging by how it starts. Raises: OSError."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return _BEGINNINGS[path.suffix].match(head) is not None


def read_profile(path: Path) -> ProfileFile | None:
    """The file's content; None if it is missing or from another version. Raises: OSError."""
    try:
        return ProfileFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        log.info("%s was not written by this version (%d differences); it was renamed.", path, error.error_count())
        return None


def _add_job(path: Path, job: JobRecord) -> None:
    before = read_profile(path)
    if before is None or len(before.jobs) >= JOBS_PER_FILE:
        _rotate(path)
        before = None
    jobs = [*(before.jobs if before else ()), job]
    replace_content(path, ProfileFile(program=program_version(), jobs=jobs).model_dump_json().encode())


def _rotate(path: Path) -> None:
    """profile.json becomes profile.1.json, that becomes profile.2.json, and so on; the oldest is deleted. Names taken by other files are skipped."""
    names = [path, *(path.with_suffix(f".{number}.json") for number in range(1, NUM_OLD_FILES + 1))]
    places = [place for place in names if not place.exists() or is_ours(place)]
    for source, target in reversed(list(itertools.pairwise(places))):
        if source.exists():
            source.replace(target)


# the trace format of chrome://tracing and Perfetto: times in microseconds, one "thread" per slot for its work and one for copies to it


def chrome_trace(job: JobRecord) -> dict[str, Any]:
    """The job's spans and waits in Chrome's trace format."""
    return {"displayTimeUnit": "ms", "otherData": {"job": job.id, "outcome": job.outcome}, "traceEvents": list(_trace_events(job))}


def _trace_events(job: JobRecord) -> Iterator[dict[str, Any]]:
    lanes: dict[int | None, str] = {None: "host", **{slot.slot: f"slot {slot.slot}: {slot.name}" for slot in job.slots}}
    for slot, name in lanes.items():
        yield {"ph": "M", "pid": 1, "tid": _thread_of(slot), "name": "thread_name", "args": {"name": name}}
        yield {"ph": "M", "pid": 1, "tid": _thread_of(slot, copies=True), "name": "thread_name", "args": {"name": f"copies to {name}"}}
    for span in job.spans:
        told = (("bytes", span.bytes), ("link", span.link), ("batch", span.batch), ("step", span.step))
        facts = {name: value for name, value in told if value not in ("", -1) and (name, value) != ("bytes", 0)}
        yield _event(span.kind, span.name, _thread_of(span.slot, copies=span.kind == "copy"), span.start_ms, span.end_ms, facts)
    for lane in job.slots:
        for wait in lane.waits:
            yield _event("wait", f"waits for: {wait.cause}", _thread_of(lane.slot), wait.start_ms, wait.end_ms, {})
    for sample in job.samples:
        if sample.utilization_percent is not None:
            yield {"ph": "C", "pid": 1, "name": f"slot {sample.slot} %", "ts": sample.at_ms * 1000, "args": {"use": sample.utilization_percent}}


def _thread_of(slot: int | None, *, copies: bool = False) -> int:
    return (0 if slot is None else 2 * slot + 2) + int(copies)


def _event(kind: str, name: str, thread: int, start_ms: float, end_ms: float, facts: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "pid": 1, "tid": thread, "cat": kind, "name": name, "ts": start_ms * 1000, "dur": (end_ms - start_ms) * 1000, "args": facts}
