"""Short versions of the campaigns with the whole program: many clients, kill -9, SIGTERM with queued jobs."""

from __future__ import annotations

import importlib.util
import urllib.error
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tools.campaign import clients, forked, kills, soak
from tools.campaign.forked import fork_process
from tools.campaign.full_server import FullServer, start_server

pytestmark = pytest.mark.slow


def status_of(future: Future[Any]) -> int:
    try:
        future.result(60)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    return 200


def wait_for_pending(server: FullServer, number: int) -> None:
    while server.get("/internal/pending-tasks")["size"] < number:
        pass


def test_sigterm_answers_who_runs_and_who_waits_and_ends_in_order(tmp_path: Path) -> None:
    log_file = tmp_path / "log.txt"
    server = start_server(
        tmp_path / "data", log_file, ["--nowebui", "--device-id", "cpu,cpu", "--multi-gpu", "--allow-shared-slots"], start=fork_process
    )
    try:
        server.txt2img()
        with ThreadPoolExecutor(3) as pool:
            running = pool.submit(server.txt2img, steps=1000)
            while not server.get("/sdapi/v1/progress?skip_current_image=true")["state"]["sampling_step"]:
                pass
            waiting = [pool.submit(server.txt2img) for _ in range(2)]
            wait_for_pending(server, 2)
            assert server.end() == 0
            assert [status_of(one) for one in (running, *waiting)] == [200, 503, 503]
    finally:
        server.kill()
    text = log_file.read_text()
    assert "terminate called" not in text and "Traceback" not in text


def test_many_clients_get_their_own_pictures() -> None:
    found = clients.run(clients=6, seconds=2, start=fork_process)
    assert found["same"] > 0 and set(+found) <= {"same", "clients without an answer"}


def test_kills_leave_nothing_half_written_or_lost() -> None:
    result = kills.run(rounds=3)
    assert (result.faults, result.stale, set(result.kills.values())) == ([], [], {1})
    assert result.pictures >= 3


def test_what_a_killed_run_left_half_is_seen(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "half.png").write_bytes(b"\x89PNG")
    (tmp_path / "config.json").write_text('{"a": ')
    (tmp_path / "config.json.tmp").touch()
    assert len(kills.faults_in(tmp_path)) == 2
    assert kills.rests_in(tmp_path) == ["config.json.tmp"]


def test_what_was_answered_and_is_not_there_is_seen(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "1.png").touch()
    (tmp_path / "config.json").write_text('{"jpeg_quality": 21}')
    busy = kills.Busy(FullServer(address="", process=None), saved=1, sent=22, accepted=21)  # type: ignore[arg-type]
    assert kills.lost_in(tmp_path, busy, num_before=0) == []
    busy.accepted = 22
    assert kills.lost_in(tmp_path, busy, num_before=1) == [
        "1 pictures were answered, 0 are there",
        "jpeg_quality is 21 after 22 was answered and 22 sent",
    ]


def test_growth_is_seen_after_the_first_fifth() -> None:
    flat = [(n, 100 << 20, 20, 30) for n in range(10)]
    assert soak.is_flat(flat)
    assert soak.is_flat([(0, 1 << 20, 1, 1), *flat])
    assert not soak.is_flat([*flat, (10, 300 << 20, 20, 30)])
    assert not soak.is_flat([*flat, (10, 100 << 20, 40, 30)])
    assert not soak.is_flat([*flat, (10, 100 << 20, 20, 60)])


def test_what_servers_are_forked_with_is_there() -> None:
    """The standard library's fork server passes over names that it cannot import, and every start would import them again."""
    assert [name for name in forked.IMPORTED if importlib.util.find_spec(name) is None] == []
