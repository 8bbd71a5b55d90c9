from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules import scripts
from modules.application import Application
from modules.launch.cmd_args import config_for_tests, parse_config
from modules.launch.extension_folders import active_folders
from modules.launch.extensions import list_installers
from modules.scripts import installed as extensions
from modules.scripts.callbacks import EVENTS
from modules.scripts.extension_order import OrderRule, order_by_rules
from modules.scripts.hooks import IN_ORDER
from modules.ui import page
from tests.support.applications import installed_application
from tests.support.extensions import write_extension


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        yield app
        extensions.forget()


def listed(app: Application, tmp_path: Path, *builtin: str) -> list[str]:
    """Names of the enabled ones; `builtin` are folders included with the program."""
    for name in builtin:
        (tmp_path / "builtin" / name).mkdir(parents=True, exist_ok=True)
    extensions.list_extensions(app.config, app.options, builtin_dir=tmp_path / "builtin")
    return [extension.name for extension in extensions.active()]


def test_built_in_ones_come_first_then_by_name(app: Application, tmp_path: Path) -> None:
    for name in ("zebra", "apple", ".hidden"):
        write_extension(app, name, {"readme.txt": ""})
    assert listed(app, tmp_path, "own") == ["own", "apple", "zebra"]


def test_switches_and_flags_turn_them_off(app: Application, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("apple", "zebra"):
        write_extension(app, name, {"readme.txt": ""})
    app.options.data["disabled_extensions"] = ["apple"]
    assert listed(app, tmp_path, "own") == ["own", "zebra"]
    app.options.data["disable_all_extensions"] = "extra"
    assert listed(app, tmp_path) == ["own"]
    app.options.data["disable_all_extensions"] = "all"
    with caplog.at_level(logging.INFO):
        assert listed(app, tmp_path) == []
    assert "setting disable_all_extensions" in caplog.text
    app.options.data["disable_all_extensions"] = "none"
    by_flag = config_for_tests(app.config.data_dir, flags={**app.config.flags, "disable_extra_extensions": True})
    extensions.list_extensions(by_flag, app.options, builtin_dir=tmp_path / "builtin")
    assert [extension.name for extension in extensions.active()] == ["own"]


def test_what_is_built_in_already_is_skipped_with_what_to_use_instead(app: Application, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_extension(app, "sd-webui-controlnet", {"install.py": "", "preload.py": "raise SystemError('loaded')"})
    with caplog.at_level(logging.INFO):
        assert listed(app, tmp_path) == []
    lines = [record.getMessage() for record in caplog.records if "sd-webui-controlnet" in record.getMessage()]
    assert len(lines) == 1
    assert "ControlNet is built in" in lines[0]
    assert list_installers(app.config) == []
    parse_config(["--data-dir", str(app.config.data_dir)], {})


def test_metadata_orders_extensions_and_their_scripts(app: Application, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_extension(app, "aa", {"metadata.ini": "[Extension]\nName = First\nRequires = last, gone\n", "scripts/one.py": "", "scripts/two.py": ""})
    write_extension(app, "mm", {"metadata.ini": "[scripts/x.py]\nBefore = first/two.py\n[scripts]\nAfter = last\n", "scripts/x.py": ""})
    write_extension(app, "zz", {"metadata.ini": "[Extension]\nName = last\n", "scripts/z.py": ""})
    with caplog.at_level(logging.WARNING):
        assert listed(app, tmp_path) == ["mm", "zz", "aa"]
    assert "Extension aa requires gone, which is not installed" in caplog.text
    assert [f"{Path(file.basedir).name}/{file.filename}" for file in scripts.list_scripts("scripts", ".py")] == [
        "zz/z.py",
        "mm/x.py",
        "aa/one.py",
        "aa/two.py",
    ]
    assert extensions.extension_paths[str((app.config.extensions_dir / "aa").absolute())].canonical_name == "first"


def test_a_circle_of_wishes_is_reported_and_nothing_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    rules = [OrderRule(first="a", then="b"), OrderRule(first="b", then="a"), OrderRule(first="c", then="a"), OrderRule(first="nobody", then="c")]
    with caplog.at_level(logging.WARNING):
        assert sorted(order_by_rules(["a", "b", "c"], rules)) == ["a", "b", "c"]
    assert "each ask to come after the other" in caplog.text
    assert order_by_rules(["a", "b", "c"], [OrderRule(first="c", then="a")]) == ["b", "c", "a"]


def test_two_of_one_name_are_reported(app: Application, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("one", "two"):
        write_extension(app, folder, {"metadata.ini": "[Extension]\nName = same\n"})
    with caplog.at_level(logging.WARNING):
        assert listed(app, tmp_path) == ["one"]
    assert "has the name 'same'" in caplog.text


def test_preload_adds_flags_and_a_broken_one_does_not_stop_the_start(app: Application, caplog: pytest.LogCaptureFixture) -> None:
    write_extension(app, "adds", {"preload.py": "def preload(parser):\n    parser.add_argument('--cats', type=int, default=3)\n"})
    write_extension(app, "broken", {"preload.py": "def preload(parser):\n    parser.add_argument('--port')\n"})
    words = ["--data-dir", str(app.config.data_dir)]
    assert parse_config(words, {}).flags["cats"] == 3
    assert parse_config([*words, "--cats", "5"], {}).flags["cats"] == 5
    assert "broken/preload.py could not add its flags" in caplog.text


def test_folders_are_told_without_an_application(tmp_path: Path) -> None:
    for name in ("on", "off", "multidiffusion-upscaler-for-automatic1111"):
        (tmp_path / "extensions" / name).mkdir(parents=True)
    (tmp_path / "builtin" / "own").mkdir(parents=True)
    settings = tmp_path / "config.json"

    def names(**flags: bool) -> list[str]:
        return [path.name for path in active_folders(tmp_path / "extensions", settings, flags, builtin_dir=tmp_path / "builtin")]

    assert names() == ["own", "off", "on"]
    settings.write_text('{"disabled_extensions": ["off"]}', encoding="utf-8")
    assert names() == ["own", "on"]
    assert names(disable_extra_extensions=True) == ["own"]
    assert names(disable_all_extensions=True) == []
    settings.write_text("[1, 2", encoding="utf-8")
    assert names() == ["own", "off", "on"]


def test_the_page_gets_their_scripts_and_style_sheets(app: Application, tmp_path: Path) -> None:
    files = {"javascript/a.js": "let a = '</script>';", "javascript/b.mjs": "export {};", "javascript/c.txt": "no", "style.css": ".mine {}"}
    write_extension(app, "paints", files)
    listed(app, tmp_path)
    found = [*scripts.list_scripts("javascript", ".js"), *scripts.list_scripts("javascript", ".mjs")]
    assert [file.filename for file in found] == ["a.js", "b.mjs"]
    (tmp_path / "none").mkdir()
    head = page.head_html(app.config, tmp_path / "none", more_scripts=[Path(file.path) for file in found])
    assert "let a = '<\\/script>';" in head
    assert '<script data-file="b.mjs" type="module">' in head
    sheets = [Path(sheet) for sheet in scripts.list_files_with_name("style.css", include_own=False)]
    assert page.style_text(app.config, more_sheets=sheets).rstrip().endswith(".mine {}")


def test_a_clone_tells_where_it_came_from(app: Application, tmp_path: Path) -> None:
    folder = write_extension(app, "cloned", {"a.txt": "a"})
    commands = [
        ["init", "-q", "-b", "trunk"],
        ["remote", "add", "origin", "https://example.org/x.git"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-q", "-m", "a"],
    ]
    for command in commands:
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    listed(app, tmp_path)
    extension = extensions.find_extension(str(folder / "a.txt"))
    assert extension is not None
    extension.read_info_from_repo()
    assert (extension.remote, extension.branch) == ("https://example.org/x.git", "trunk")
    assert len(extension.commit_hash) == 40
    assert extension.version == extension.commit_hash[:8]
    assert extension.commit_date is not None


def test_the_page_about_extensions_has_every_hook_and_event() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "extensions.md").read_text(encoding="utf-8")
    for hook in IN_ORDER:
        assert f"| `{hook.name}` |" in text
        assert hook.sentence in text
    for name, event in EVENTS.items():
        assert f"| `on_{name}` | {event.sentence}" in text
