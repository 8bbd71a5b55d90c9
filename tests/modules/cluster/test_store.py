from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from modules.cluster.store import JobStore, StoreError


def ids(store: JobStore) -> list[str]:
    return [job.task_id for job in store.read_all()]


def test_jobs_come_back_in_order_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "cluster" / "jobs.sqlite3"
    store = JobStore(path)
    for number in range(4):
        store.add(f"task({number})", "txt2img", bytes([number]))
    store.remove("task(1)")
    store.close()
    again = JobStore(path)
    assert [(job.task_id, job.name, job.message) for job in again.read_all()] == [(f"task({n})", "txt2img", bytes([n])) for n in (0, 2, 3)]
    again.close()


def test_a_kill_loses_no_accepted_job(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite3"
    lines = ["import os, sys, pathlib", "from modules.cluster.store import JobStore", "store = JobStore(pathlib.Path(sys.argv[1]))"]
    code = "\n".join([*lines, "store.add('a', 'n', b'm')", "os._exit(9)"])
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60).returncode == 9
    store = JobStore(path)
    assert ids(store) == ["a"]
    store.close()


def test_starts_are_counted_even_if_the_job_is_accepted_again(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite3")
    store.add("a", "txt2img", b"1")
    store.note_start("a")
    store.add("a", "txt2img", b"2")
    assert [(job.num_starts, job.message) for job in store.read_all()] == [(1, b"2")]
    assert len(store) == 1
    store.close()


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 300, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_set_aside_and_not_deleted(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "jobs.sqlite3"
    path.write_bytes(content)
    store = JobStore(path)
    store.add("a", "txt2img", b"1")
    assert ids(store) == ["a"]
    store.close()
    aside = tmp_path / "jobs.damaged-1.sqlite3"
    assert aside.exists() == bool(content)  # SQLite takes an empty file for a new database
    if content:
        assert aside.read_bytes() == content
        assert "renamed to jobs.damaged-1.sqlite3" in caplog.text


def test_pages_damaged_later_are_set_aside_too(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite3"
    store = JobStore(path)
    for number in range(50):
        store.add(f"task({number})", "txt2img", bytes(3000))
    store.close()
    data = bytearray(path.read_bytes())
    data[4096 : 4096 * 8] = b"\x55" * (4096 * 7)
    path.write_bytes(bytes(data))
    again = JobStore(path)
    again.add("new", "txt2img", b"1")
    assert ids(again) == ["new"]
    again.close()
    assert (tmp_path / "jobs.damaged-1.sqlite3").read_bytes() == bytes(data)


def test_a_file_of_another_program_or_version_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite3"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE jobs (something TEXT)")
    other.close()
    copy = tmp_path / "copy"
    shutil.copy(path, copy)
    JobStore(path).close()
    assert (tmp_path / "jobs.damaged-1.sqlite3").read_bytes()[100:] == copy.read_bytes()[100:]


def test_a_second_server_on_the_same_folder_is_refused_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JobStore(tmp_path / "jobs.sqlite3")
    store.add("a", "txt2img", b"1")
    monkeypatch.setattr("modules.cluster.store._BUSY_TIMEOUT_S", 0.1)
    with pytest.raises(OSError, match="is another server running on this data folder"):
        JobStore(tmp_path / "jobs.sqlite3")
    store.add("b", "txt2img", b"1")
    assert ids(store) == ["a", "b"]
    store.close()
    assert not list(tmp_path.glob("*damaged*"))


def test_a_full_disk_refuses_the_job_and_keeps_the_others(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite3")
    store.add("a", "txt2img", b"1")
    store._connection.execute("PRAGMA max_page_count = 4")  # SQLite's own "disk is full"
    with pytest.raises(StoreError, match=r"was not accepted: .*full") as caught:
        store.add("b", "txt2img", bytes(1 << 20))
    assert (caught.value.status, caught.value.retry_after_s) == (507, 60)
    assert ids(store) == ["a"]
    store.remove("a")
    store.add("c", "txt2img", b"1")
    assert ids(store) == ["c"]
    store.close()


def test_what_cannot_be_removed_is_only_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = JobStore(tmp_path / "jobs.sqlite3")
    store.close()
    store.remove("a")
    store.note_start("a")
    assert "would run again" in caplog.text
