from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import pytest

from modules.application import Application
from modules.scripts import installed as extensions
from modules.ui.extensions import ExtensionsHandlers, create_extensions_tab
from tests.support.applications import installed_application
from tests.support.extensions import write_extension


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        for name in ("apple", "<zebra>"):
            write_extension(app, name, {"a.txt": ""})
        app.extensions = extensions.list_extensions(app.config, app.options, builtin_dir=tmp_path / "none")
        yield app
        extensions.forget()


def test_switches_are_kept_for_the_next_start(app: Application) -> None:
    app.options.data["disabled_extensions"] = ["gone for now"]
    handlers = ExtensionsHandlers(app)
    assert handlers.switched_on() == ["<zebra>", "apple"]
    assert "Saved" in handlers.save(["apple"], "extra")
    kept = json.loads(app.config.settings_file.read_text(encoding="utf-8"))
    assert (kept["disabled_extensions"], kept["disable_all_extensions"]) == (["gone for now", "<zebra>"], "extra")
    assert app.state.server_command is None
    handlers.save_and_restart(["apple"], "none")
    assert app.state.server_command == "restart"


def test_other_computers_may_not_switch(app: Application, tmp_path: Path) -> None:
    with installed_application(tmp_path / "other", disable_extension_access=True) as remote:
        assert "--enable-insecure-extension-access" in ExtensionsHandlers(remote).save_and_restart([], "all")
        assert remote.options.disable_all_extensions == "none"
        assert remote.state.server_command is None


def test_the_table_names_what_there_is(app: Application) -> None:
    table = ExtensionsHandlers(app).table()
    assert "<td>apple</td><td>folder</td>" in table
    assert "&lt;zebra&gt;" in table
    app.extensions = []
    assert "There are no extensions" in ExtensionsHandlers(app).table()


def test_the_tab_has_its_controls(app: Application) -> None:
    with gr.Blocks(analytics_enabled=False) as page, gr.Tab("Extensions") as item:
        create_extensions_tab(app, item)
    ids = {block.elem_id for block in page.blocks.values()}
    assert {"extensions_apply", "extensions_disable_all", "extensions_enabled_list", "extensions_installed_html"} <= ids
