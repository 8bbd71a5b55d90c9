"""Settings, flags, memory, the model, stopping."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from modules.settings.table import build_option_table
from tests.modules.api.conftest import Server, ServerFactory


def test_options_hold_every_setting(server: Server) -> None:
    options = server.get("/sdapi/v1/options")
    expected = {key for key, info in build_option_table({}).items() if not info.do_not_save}
    assert expected <= set(options)
    assert options["samples_format"] == "png"


def test_options_that_were_read_can_be_sent_back(server: Server) -> None:
    options = server.get("/sdapi/v1/options")
    assert server.post("/sdapi/v1/options", options) is None
    assert server.get("/sdapi/v1/options") == options


def test_settings_are_changed_and_saved(server: Server) -> None:
    server.post("/sdapi/v1/options", {"samples_format": "webp", "CLIP_stop_at_last_layers": 2, "sd_model_checkpoint": "tiny"})
    options = server.get("/sdapi/v1/options")
    assert (options["samples_format"], options["CLIP_stop_at_last_layers"]) == ("webp", 2)
    assert options["sd_model_checkpoint"].startswith("tiny.safetensors")
    saved = json.loads(server.app.config.settings_file.read_text(encoding="utf-8"))
    assert saved["samples_format"] == "webp"


def test_one_wrong_setting_changes_none(server: Server) -> None:
    answer = server.client.post("/sdapi/v1/options", json={"samples_format": "webp", "CLIP_stop_at_last_layers": "x"})
    assert answer.status_code == 422
    assert server.app.options.samples_format == "png"
    assert not server.app.config.settings_file.exists()


def test_settings_that_the_disk_has_no_room_for_are_not_changed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def has_no_room(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("modules.settings.options.write_text_atomically", has_no_room)
    answer = server.client.post("/sdapi/v1/options", json={"samples_format": "webp"})
    assert answer.status_code == 507
    assert "disk of the server is full" in answer.json()["detail"]
    assert server.app.options.samples_format == "png"


def test_folders_may_be_chosen_below_the_data_folder_or_with_a_password(start_server: ServerFactory, tmp_path: Path) -> None:
    with start_server() as server:
        server.post("/sdapi/v1/options", {"outdir_samples": str(tmp_path / "outputs" / "mine")})
        server.post("/sdapi/v1/options", {"outdir_samples": "outputs/mine"})
        assert server.client.post("/sdapi/v1/options", json={"outdir_samples": "/elsewhere"}).status_code == 422
    with start_server(api_auth=(("a", "b"),)) as server:
        server.post("/sdapi/v1/options", {"outdir_samples": "/elsewhere"}, auth=("a", "b"))
        assert server.app.options.outdir_samples == "/elsewhere"


def test_frozen_and_hidden_settings_stay(start_server: ServerFactory) -> None:
    with start_server(freeze_settings=True) as server:
        answer = server.client.post("/sdapi/v1/options", json={"samples_format": "webp"})
        assert answer.status_code == 422
        assert "--freeze-settings" in answer.json()["detail"]
    with start_server(hide_ui_dir_config=True, api_auth=(("a", "b"),)) as server:
        answer = server.client.post("/sdapi/v1/options", json={"outdir_samples": "x"}, auth=("a", "b"))
        assert answer.status_code == 422
        assert "--hide-ui-dir-config" in answer.json()["detail"]


def test_flags_without_passwords(start_server: ServerFactory) -> None:
    with start_server(api_auth=(("ann", "s3cret"),), port=7999) as server:
        flags = server.get("/sdapi/v1/cmd-flags", auth=("ann", "s3cret"))
        assert flags["port"] == 7999
        assert "s3cret" not in json.dumps(flags)
        assert "s3cret" not in server.client.get("/internal/sysinfo", auth=("ann", "s3cret")).text


def test_memory(server: Server) -> None:
    memory = server.get("/sdapi/v1/memory")
    assert set(memory["ram"]) == {"free", "used", "total"}
    assert 0 < memory["ram"]["used"] < memory["ram"]["total"]
    assert memory["cuda"] == {"error": "unavailable"} or set(memory["cuda"]) == {
        "system", "active", "allocated", "reserved", "inactive", "events"
    }  # fmt: skip
    assert set(memory) == {"ram", "cuda"}
    assert server.get("/sdapi/v1/multi-gpu")["slots"][0]["total_bytes"] > 0


class HostOfTest:
    """Replaces the model host and records what is requested."""

    def __init__(self, app: Any) -> None:
        self.calls: list[str] = []
        self._app = app

    def unload(self) -> None:
        self.calls.append(f"unload in {self._app.state.job}")

    def resolve(self, options: Any = None) -> None:
        self.calls.append("resolve")

    def ensure_loaded(self, options: Any = None) -> None:
        self.calls.append(f"load in {self._app.state.job}")


def test_the_model_is_unloaded_and_loaded_by_the_worker(server: Server) -> None:
    server.app.models = host = HostOfTest(server.app)  # type: ignore[assignment]
    assert server.post("/sdapi/v1/unload-checkpoint") == {}
    assert server.post("/sdapi/v1/reload-checkpoint") == {}
    assert host.calls == ["unload in unload-checkpoint", "resolve", "load in reload-checkpoint"]


@pytest.mark.parametrize(("route", "command"), [("server-stop", "stop"), ("server-kill", "kill"), ("server-restart", "restart")])
def test_stopping_is_a_flags_matter(start_server: ServerFactory, route: str, command: str) -> None:
    with start_server() as server:
        assert server.client.post(f"/sdapi/v1/{route}").status_code == 404
    with start_server(api_server_stop=True) as server:
        server.app.restartable = True
        assert server.client.post(f"/sdapi/v1/{route}").status_code == 200
        assert server.app.state.wait_for_server_command(0) == command
        assert server.app.state.interrupted


def test_a_server_that_nobody_starts_again_says_so(start_server: ServerFactory) -> None:
    with start_server(api_server_stop=True) as server:
        assert server.client.post("/sdapi/v1/server-restart").status_code == 501
        assert server.app.state.wait_for_server_command(0) is None


def test_multi_gpu_tells_of_slots_plan_and_links(server: Server) -> None:
    from backend.parallel.planning.plan import Piece, Plan, ReplicaPlan
    from backend.parallel.planning.slot_facts import Link
    from backend.parallel.running import status  # imports torch

    status.set_current_plan(None)
    status.set_links((), {})
    answer = server.get("/sdapi/v1/multi-gpu")
    assert answer["plan"] is None
    assert answer["links"] == []
    slot_fields = "index name torch_device vram_state total_bytes free_bytes resident_bytes peak_bytes speed utilization temperature power"
    assert [list(slot) for slot in answer["slots"]] == [slot_fields.split()]
    plan = Plan(
        strategy="replicas", replicas=tuple(ReplicaPlan(pieces=(Piece(0),), slots=(slot,)) for slot in (0, 1)), reason="why", predicted_bytes={0: 7}
    )
    status.set_current_plan(plan, rows=(1, 1), measured_ms=3.5)
    status.set_links([Link(source=0, target=1)], {})
    answer = server.get("/sdapi/v1/multi-gpu")
    status.set_current_plan(None)
    status.set_links((), {})
    assert answer["plan"] == {
        "strategy": "replicas", "reason": "why", "replicas": 2, "stages": [[0], [1]], "rows": [1, 1],
        "predicted_ms": None, "measured_ms": 3.5, "predicted_bytes": {"0": 7}, "tiles": [],
    }  # fmt: skip
    assert list(answer["links"][0]) == ["source", "target", "route", "reason", "bytes_per_ms", "latency_ms"]
