from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backend.args import BackendConfig
from modules.application import Application, build_application
from modules.checkpoints import models as sd_models
from modules.checkpoints.models import ModelLoadError, ModelRequest, select_starting_checkpoint
from modules.checkpoints.vae_files import UnknownModuleError
from modules.errors import NoCheckpointError
from modules.launch.cmd_args import config_for_tests


def write_model(path: Path, *keys: str) -> Path:
    header = json.dumps({key: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for key in keys}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + path.name.encode())
    return path


class Engine:
    """Replaces a loaded model."""

    embeddings = None


class Loader:
    """Records requested loads; fails for files with "broken" in their name."""

    def __init__(self) -> None:
        self.requests: list[ModelRequest] = []

    def __call__(self, request: ModelRequest, config: BackendConfig) -> Any:
        self.requests.append(request)
        if "broken" in request.checkpoint.name:
            raise ModelLoadError(f"{request.checkpoint.name}: is no model.")
        return Engine()

    @property
    def names(self) -> list[str]:
        return [request.checkpoint.name_for_extra for request in self.requests]


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    monkeypatch.setattr(sd_models, "_free_devices", lambda: None)
    monkeypatch.setattr(sd_models, "held_bytes", lambda _engine: 1000)
    return Loader()


@pytest.fixture
def app(tmp_path: Path, loader: Loader) -> Application:
    for name in ("one", "two", "broken"):
        write_model(tmp_path / "models" / "Stable-diffusion" / f"{name}.safetensors")
    write_model(tmp_path / "models" / "VAE" / "nice.vae.safetensors")
    return build_application(config_for_tests(tmp_path), load=loader)


def test_the_same_request_is_loaded_once(app: Application, loader: Loader) -> None:
    app.options.sd_model_checkpoint = "two"
    first = app.models.ensure_loaded()
    assert app.models.ensure_loaded() is first
    assert loader.names == ["two"]
    assert app.models.loaded_checkpoint is not None
    assert first.sd_checkpoint_info.title.startswith("two.safetensors [")  # type: ignore[attr-defined]


def test_override_settings_choose_another_model_without_changing_the_settings(app: Application, loader: Loader) -> None:
    app.options.sd_model_checkpoint = "one"
    app.models.ensure_loaded(app.options.snapshot({"sd_model_checkpoint": "two"}))
    assert app.options.sd_model_checkpoint == "one"
    one = app.models.ensure_loaded()
    assert loader.names == ["two", "one"]
    assert app.models.engine is one


def test_the_model_before_waits_and_is_not_read_again(app: Application, loader: Loader) -> None:
    one, two = (app.options.snapshot({"sd_model_checkpoint": name}) for name in ("one", "two"))
    first = app.models.ensure_loaded(one)
    app.models.ensure_loaded(two)
    assert app.models.ensure_loaded(one) is first
    assert app.models.loaded_checkpoint is not None
    assert app.models.loaded_checkpoint.name_for_extra == "one"
    app.models.ensure_loaded(two)
    assert loader.names == ["one", "two"]


def test_without_room_nothing_waits(app: Application, loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.models, "_waiting_budget_bytes", lambda: 999)
    one, two = (app.options.snapshot({"sd_model_checkpoint": name}) for name in ("one", "two"))
    for wanted in (one, two, one):
        app.models.ensure_loaded(wanted)
    assert loader.names == ["one", "two", "one"]


def test_a_model_that_does_not_load_leaves_the_one_before_usable(app: Application, loader: Loader) -> None:
    app.options.sd_model_checkpoint = "one"
    before = app.models.ensure_loaded()
    with pytest.raises(ModelLoadError, match="is no model"):
        app.models.ensure_loaded(app.options.snapshot({"sd_model_checkpoint": "broken"}))
    assert app.models.engine is before
    assert app.models.ensure_loaded() is before
    assert loader.names == ["one", "broken"]


def test_other_modules_and_a_changed_file_are_another_model(app: Application, loader: Loader) -> None:
    app.options.sd_model_checkpoint = "one"
    app.models.ensure_loaded()
    request = app.models.resolve(app.options.snapshot({"forge_additional_modules": ["nice.vae.safetensors"]}))
    assert [path.name for path in request.additional_modules] == ["nice.vae.safetensors"]
    app.models.serve(request)
    write_model(app.config.ckpt_dirs[0] / "one.safetensors", "changed")
    app.models.ensure_loaded()
    assert loader.names == ["one", "one", "one"]


def test_sd_vae_of_older_requests_names_a_module(app: Application) -> None:
    chosen = app.models.resolve(app.options.snapshot({"sd_vae": "nice.vae.safetensors"})).additional_modules
    assert [path.name for path in chosen] == ["nice.vae.safetensors"]
    assert app.models.resolve(app.options.snapshot({"sd_vae": "Automatic"})).additional_modules == ()


def test_an_unknown_module_is_an_error_that_names_the_folders(app: Application, tmp_path: Path) -> None:
    outside = write_model(tmp_path / "outside.safetensors")
    for name in ("gone.safetensors", str(outside)):
        with pytest.raises(UnknownModuleError, match="VAE"):
            app.models.resolve(app.options.snapshot({"forge_additional_modules": [name]}))


def test_a_checkpoint_put_there_later_is_found_without_restart(tmp_path: Path, loader: Loader) -> None:
    app = build_application(config_for_tests(tmp_path), load=loader)
    with pytest.raises(NoCheckpointError):
        app.models.ensure_loaded()
    write_model(tmp_path / "models" / "Stable-diffusion" / "new.safetensors")
    app.models.ensure_loaded()
    assert loader.names == ["new"]


def test_unloading_drops_the_model_and_the_next_job_loads_it_again(app: Application, loader: Loader) -> None:
    app.options.sd_model_checkpoint = "one"
    app.models.ensure_loaded()
    app.models.unload()
    assert app.models.engine is None
    app.models.ensure_loaded()
    assert len(loader.requests) == 2


def test_a_checkpoint_that_the_settings_name_and_that_is_gone_is_said(app: Application, caplog: pytest.LogCaptureFixture) -> None:
    app.checkpoints.refresh()
    fields: dict[str, Any] = {"named": None, "want_sdxl": False}
    select_starting_checkpoint(app.checkpoints, saved="one", **fields)
    select_starting_checkpoint(app.checkpoints, saved=None, **fields)
    assert "does not exist" not in caplog.text
    select_starting_checkpoint(app.checkpoints, saved="sub\\twoo.safetensors [0123456789]", **fields)
    assert "checkpoint 'sub\\\\twoo.safetensors [0123456789]' does not exist; nearest are 'two.safetensors" in caplog.text
    assert "Until then, broken.safetensors is used." in caplog.text


def test_the_checkpoint_selected_at_start(tmp_path: Path, app: Application) -> None:
    def selected(**kwargs: Any) -> str | None:
        info = select_starting_checkpoint(app.checkpoints, **{"named": None, "saved": None, "want_sdxl": False, **kwargs})
        return None if info is None else info.name_for_extra

    app.checkpoints.refresh()
    assert selected() == "broken"
    assert selected(saved="two.safetensors [0123456789]") == "two"
    assert selected(saved="gone") == "broken"
    assert selected(saved="one", named=app.config.ckpt_dirs[0] / "two.safetensors") == "two"
    assert selected(saved="one", want_sdxl=True) == "one"
    write_model(app.config.ckpt_dirs[0] / "xl.safetensors", "conditioner.embedders.1.model.ln_final.weight")
    app.checkpoints.refresh()
    assert selected(saved="one", want_sdxl=True) == "xl"


def test_how_pictures_are_divided_goes_to_the_reader_and_makes_no_other_model(app: Application, loader: Loader) -> None:
    app.options.set("sd_model_checkpoint", "one")
    app.options.set("multi_gpu_strategy", "layers")
    app.models.ensure_loaded()
    app.options.set("multi_gpu_strategy", "replicas")
    app.models.ensure_loaded()
    assert [request.multi_gpu_strategy for request in loader.requests] == ["layers"]
