from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from modules import shared
from modules.application import Application
from tests.support.applications import installed_application

# the names of forge_surface 2.4 and those imported by the counted extensions; none may disappear unnoticed
NAMES = [
    "cmd_opts", "parser", "opts", "state", "sd_model", "demo",
    "device", "xformers_available", "hypernetworks", "loaded_hypernetworks", "prompt_styles", "interrogator",
    "face_restorers", "sd_upscalers", "options_templates", "restricted_opts", "settings_components", "tab_names",
    "latent_upscale_modes", "latent_upscale_default_mode", "clip_model", "progress_print_out", "gradio_theme", "total_tqdm",
    "mem_mon", "hide_dirs", "styles_filename", "config_filename", "batch_cond_uncond", "parallel_processing_allowed",
    "weight_load_location", "hf_endpoint", "options_section", "OptionInfo", "OptionHTML", "natural_sort_key",
    "listfiles", "html_path", "html", "walk_files", "ldm_print", "reload_gradio_theme",
    "list_checkpoint_tiles", "refresh_checkpoints", "list_samplers", "reload_hypernetworks", "data_path", "models_path",
]  # fmt: skip


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path) as app:
        yield app


def test_every_name_of_the_contract_can_be_read(app: Application) -> None:
    missing = [name for name in NAMES if not hasattr(shared, name)]
    assert missing == []


def test_an_unknown_name_is_an_attribute_error(app: Application) -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = shared.no_such_name


def test_the_lobby_shows_the_installed_application(app: Application, tmp_path: Path) -> None:
    assert shared.opts is app.options
    assert shared.state is app.state
    assert shared.sd_model is None
    assert shared.prompt_styles is app.styles
    assert shared.config_filename == str(tmp_path / "config.json")
    shared.opts.data["samples_format"] = "webp"
    assert app.options.samples_format == "webp"


def test_flags_are_read_by_name_and_unknown_ones_are_none(app: Application) -> None:
    assert shared.cmd_opts.no_hashing is False
    assert shared.cmd_opts.a_flag_that_is_gone is None


def test_extensions_add_settings(app: Application) -> None:
    shared.opts.add_option("mine", shared.OptionInfo(3, "Mine", section=("mine", "Mine")))
    assert shared.opts.mine == 3


def test_files_are_listed_in_natural_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b10.txt", "b9.txt", ".hidden", "sub/a.png"):
        (tmp_path / name).write_text("", encoding="utf8")
    assert [Path(name).name for name in shared.listfiles(str(tmp_path))] == ["b9.txt", "b10.txt"]
    assert [Path(name).name for name in shared.walk_files(str(tmp_path), [".png"])] == ["a.png"]
    assert shared.listfiles(str(tmp_path / "gone")) == []


def test_without_an_application_reading_says_so() -> None:
    with pytest.raises(RuntimeError, match="no application"):
        _ = shared.opts


def test_a_flag_is_in_the_command_line_whether_it_is_set_or_not(tmp_path: Path) -> None:
    with installed_application(tmp_path):
        assert "api" in shared.cmd_opts and "no_such_flag" not in shared.cmd_opts
        assert shared.cmd_opts.no_such_flag is None
