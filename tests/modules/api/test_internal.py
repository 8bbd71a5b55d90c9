from __future__ import annotations

from modules.launch.version import program_version
from tests.modules.api.conftest import Server


def test_ping(server: Server) -> None:
    assert server.get("/internal/ping") == {}


def test_quicksettings_hint_names_every_setting(server: Server) -> None:
    hints = {hint["name"]: hint["label"] for hint in server.get("/internal/quicksettings-hint")}
    assert hints["CLIP_stop_at_last_layers"] == "Clip skip"


def test_profile_startup(server: Server) -> None:
    assert set(server.get("/internal/profile-startup")) == {"total", "records"}


def test_sysinfo(server: Server) -> None:
    info = server.get("/internal/sysinfo")
    assert info["Python"] and info["Version"] == program_version()
    assert info["data_path"] == str(server.app.config.data_dir)
    answer = server.client.get("/internal/sysinfo-download")
    assert answer.headers["Content-Disposition"].startswith('attachment; filename="sysinfo-')
    assert answer.json()["packages"]
