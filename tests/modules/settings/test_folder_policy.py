from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modules.api.settings import check_settings
from modules.app_config import SCRIPT_DIR
from modules.application import Application
from modules.errors import OptionError, RequestError
from modules.settings.options import active_overrides
from tests.support.applications import installed_application


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        yield app


def hostile_folders(app: Application, tmp_path: Path) -> list[str]:
    data = app.config.data_dir
    (data / "outputs").mkdir(parents=True)
    (data / "outputs" / "link").symlink_to(SCRIPT_DIR)
    own = [SCRIPT_DIR, SCRIPT_DIR / "modules", data, data / "models" / "Lora", data / "extensions" / "new", data / "cache", data / "config_states"]
    ways = [f"{data}/outputs/../models", str(data / "outputs" / "link"), f"{data}/outputs/\0x", str(app.config.ckpt_dirs[0])]
    return [*map(str, own), *ways]


def test_folders_of_the_program_are_never_for_outputs(app: Application, tmp_path: Path) -> None:
    for folder in hostile_folders(app, tmp_path):
        for key in ("outdir_samples", "outdir_txt2img_samples", "outdir_save", "outdir_grids", "outdir_init_images", "temp_dir"):
            with pytest.raises(OptionError, match=key):
                app.options.set(key, folder)
            with pytest.raises(OptionError, match=key):
                app.options.snapshot({key: folder})
    assert app.options.outdir_samples == ""


def test_others_are_taken_from_the_owner_and_only_outputs_from_everyone_else(app: Application, tmp_path: Path) -> None:
    info = app.options.data_labels["outdir_samples"]
    elsewhere, below = str(tmp_path / "elsewhere"), str(app.config.outputs_dir / "mine")
    app.folders.check_from_client("outdir_samples", info, elsewhere, is_trusted=True)
    for trusted in (True, False):
        app.folders.check_from_client("outdir_samples", info, below, is_trusted=trusted)
    with pytest.raises(OptionError, match="--api-auth"):
        app.folders.check_from_client("outdir_samples", info, elsewhere, is_trusted=False)
    app.options.set("outdir_samples", elsewhere)
    assert app.options.snapshot({"outdir_grids": elsewhere}).outdir_grids == elsewhere


def test_a_folder_that_the_settings_file_names_is_for_everyone(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "pictures"
    data.mkdir()
    (data / "config.json").write_text(f'{{"outdir_save": "{elsewhere}"}}')
    with installed_application(data) as app:
        info = app.options.data_labels["outdir_samples"]
        app.folders.check_from_client("outdir_samples", info, str(elsewhere / "more"), is_trusted=False)


@pytest.mark.parametrize(
    ("config", "is_allowed"),
    [({}, True), ({"host": "0.0.0.0"}, False), ({"share": True}, False), ({"host": "0.0.0.0", "gradio_auth": (("a", "b"),)}, True)],
)
def test_batch_folders_are_for_local_users_and_those_with_a_password(tmp_path: Path, config: dict[str, Any], is_allowed: bool) -> None:
    with installed_application(tmp_path / "data", **config) as app:
        app.folders.check_batch_folder("Input directory", str(app.config.outputs_dir / "x"))
        app.folders.check_batch_folder("Input directory", "")
        if is_allowed:
            app.folders.check_batch_folder("Input directory", str(tmp_path))
            app.folders.check_batch_folder("Output directory", str(tmp_path / "out"), is_written=True)
        else:
            with pytest.raises(RequestError, match="--gradio-auth"):
                app.folders.check_batch_folder("Input directory", str(tmp_path))
        with pytest.raises(RequestError, match="belongs to the program"):
            app.folders.check_batch_folder("Output directory", str(app.config.models_dir), is_written=True)


def test_allowed_paths_open_a_folder_for_batches(tmp_path: Path) -> None:
    with installed_application(tmp_path / "data", share=True, gradio_allowed_paths=(str(tmp_path / "pics"),)) as app:
        app.folders.check_batch_folder("Input directory", str(tmp_path / "pics" / "a"))


@pytest.mark.parametrize(
    "name", ["trace.txt", "config", "../x.json", "a/b.json", "a\\b.json", "/etc/x.json", ".x.json", "C:x.json", "x\n.json", "x" * 300]
)
def test_logs_have_a_plain_name_and_their_suffix(app: Application, name: str) -> None:
    with pytest.raises(OptionError, match="profiling_filename"):
        app.options.snapshot({"profiling_filename": name})
    assert app.options.snapshot({"profiling_filename": "mine.json"}).profiling_filename == "mine.json"


def test_what_no_request_may_change_stays_in_every_way(app: Application, caplog: pytest.LogCaptureFixture) -> None:
    options = app.options
    overrides = {"api_forbid_local_requests": False, "api_enable_requests": False, "eta_ancestral": 0.5}
    snapshot = options.snapshot(overrides)
    assert (snapshot.api_forbid_local_requests, snapshot.api_enable_requests, snapshot.eta_ancestral) == (True, True, 0.5)
    assert "api_forbid_local_requests" in caplog.text
    token = active_overrides.set(overrides)
    try:
        assert (options.api_forbid_local_requests, options.eta_ancestral) == (True, 0.5)
    finally:
        active_overrides.reset(token)
    assert options.set("api_forbid_local_requests", False, is_api=True) is False
    assert options.api_forbid_local_requests is True


def test_hidden_folder_settings_are_not_changed_by_a_request_either(tmp_path: Path) -> None:
    with installed_application(tmp_path / "data", hide_ui_dir_config=True) as app:
        for key in ("outdir_samples", "samples_filename_pattern"):
            with pytest.raises(OptionError, match="--hide-ui-dir-config"):
                app.options.snapshot({key: str(app.config.outputs_dir / "x")})


@pytest.mark.parametrize(
    "values",
    [
        {"outdir_samples": str(SCRIPT_DIR), "samples_filename_pattern": "requirements_versions", "save_txt": True},
        {"outdir_txt2img_samples": "/"},
        {"outdir_save": "models"},
        {"font": "/etc/passwd"},
        {"control_net_models_path": "/etc"},
        {"profiling_filename": "config.json/../x.safetensors"},
        {"api_forbid_local_requests": False},
        {"api_useragent": "x"},
    ],
)
def test_an_api_client_without_password_is_refused(app: Application, values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="setting '"):
        check_settings(app, values)
    same = {key: app.options.data[key] for key in values}
    assert check_settings(app, same) == same
