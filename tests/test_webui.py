"""The composition root, with a server that serves nothing."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import webui
from modules.app_config import AppConfig
from modules.application import Application, build_application, install
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
    app = build_application(AppConfig.for_tests(tmp_path, nowebui=True))
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
