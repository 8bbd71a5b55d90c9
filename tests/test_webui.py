"""The composition root, with a server that serves nothing."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import webui
from modules.application import Application, build_application, install
from modules.launch.cmd_args import config_for_tests, parse_config
from tests.support.event_loops import close_event_loops as close_event_loops


class _Server:
    address = "nowhere"
    is_stopped = False

    def start(self, fastapi_app: object) -> None:
        assert fastapi_app is not None

    def stop(self) -> None:
        self.is_stopped = True


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    app = build_application(config_for_tests(tmp_path, nowebui=True))
    install(app)
    yield app
    app.close()
    install(None)


def test_what_stays_is_not_collected_between_jobs_and_can_go_when_the_server_ends(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[int] = []

    def wait(app: Application) -> str:
        for thread in [thread for thread in threading.enumerate() if thread.name == "engine-import"]:
            thread.join()
        frozen.append(gc.get_freeze_count())
        return "stop"

    monkeypatch.setattr(webui, "wait_for_command", wait)
    gc.unfreeze()
    server = _Server()
    assert webui.serve(app, server, webui.EngineStart(app.config)) == "stop"  # type: ignore[arg-type]
    assert frozen[0] > 10_000
    assert gc.get_freeze_count() == 0
    assert server.is_stopped


def test_what_the_flags_ask_of_the_engine_is_done_at_start_and_what_they_cannot_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from backend import attention, memory_management
    from backend.devices import link_test

    monkeypatch.setattr(attention, "_choice", attention._Choice())
    monkeypatch.setattr(link_test, "keep_verdicts_in", lambda folder: None)
    before = memory_management.current_store()
    words = ["--device-id", "cpu", "--attention-split", "--pytorch-deterministic", "--medvram", "--cuda-stream", "--cpu-threads-per-slot", "1"]
    threads = torch.get_num_threads()
    try:
        webui.EngineStart(parse_config(["--data-dir", str(tmp_path), *words], {})).wait_for_devices()
        assert attention._choice.name == "split"
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
        memory_management.configure(before.config, before.all_slots)
    said = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert [sentence.split()[0] for sentence in said] == ["--medvram", "--cuda-stream"]
