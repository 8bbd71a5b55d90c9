"""Installing, updating and restoring extensions with real git repositories on this machine, and what is refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.application import Application
from modules.errors import RequestError
from modules.scripts import installed, installing
from modules.scripts.installed import Extension
from modules.ui.extensions import ExtensionsHandlers
from tests.support.applications import installed_application


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b", "-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always")
    return subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path, text: str) -> str:
    (folder / "scripts").mkdir(parents=True, exist_ok=True)
    (folder / "scripts" / "a.py").write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", text)
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    folder = tmp_path / "origin" / "wonder.git"
    folder.mkdir(parents=True)
    git(folder, "init", "-q")
    commit(folder, "# one")
    return folder


@pytest.fixture
def clone(origin: Path, tmp_path: Path) -> Extension:
    folder = tmp_path / "data" / "extensions" / "wonder"
    folder.parent.mkdir(parents=True)
    git(tmp_path, "clone", "-q", str(origin), str(folder))
    return Extension("wonder", str(folder))


def test_updates_are_seen_and_taken_and_changed_files_stay(origin: Path, clone: Extension) -> None:
    assert (installing.check_update(clone), clone.can_update) == ("latest", False)
    commit(origin, "# two")
    assert (installing.check_update(clone), clone.can_update) == ("1 new commits", True)
    assert installing.update(clone).startswith("updated from")
    assert (Path(clone.path) / "scripts" / "a.py").read_text() == "# two"
    assert installing.update(clone) == "latest"
    commit(origin, "# three")
    (Path(clone.path) / "scripts" / "a.py").write_text("# mine")
    with pytest.raises(RequestError, match="git merge failed"):
        installing.update(clone)
    assert (Path(clone.path) / "scripts" / "a.py").read_text() == "# mine"


def test_a_state_is_saved_and_restored(origin: Path, clone: Extension, tmp_path: Path) -> None:
    first = git(Path(clone.path), "rev-parse", "HEAD")
    file = installing.save_state(tmp_path / "states", [clone, Extension("plain", str(tmp_path))], ["off"], "before / trying")
    assert json.loads(file.read_text())["extensions"]["wonder"]["commit_hash"] == first
    assert file.name.endswith("before-trying.json")
    commit(origin, "# two")
    installing.update(clone)
    off, done = installing.restore_state(tmp_path / "states", file.stem, [clone])
    assert (off, done) == (["off"], [f"wonder: now at {first[:8]}", "plain: is not installed any more"])
    assert git(Path(clone.path), "rev-parse", "HEAD") == first
    assert installing.check_update(clone) == "1 new commits"  # it still follows its branch
    for name in ("../states/x", "nothing", ""):
        with pytest.raises(RequestError, match="no saved state"):
            installing.restore_state(tmp_path / "states", name, [clone])
    (tmp_path / "states" / "bad.json").write_text('{"extensions": {"wonder": {"commit_hash": "--output=/x"}}, "disabled": []}')
    assert installing.restore_state(tmp_path / "states", "bad", [clone]) == ([], [])


def test_a_folder_is_copied_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "mine" / "scripts").mkdir(parents=True)
    (tmp_path / "mine" / "scripts" / "a.py").write_text("#")
    target = installing.install(str(tmp_path / "mine"), tmp_path / "extensions", name="my own")
    assert (target.name, (target / "scripts" / "a.py").read_text()) == ("my own", "#")
    with pytest.raises(RequestError, match="exists already"):
        installing.install(str(tmp_path / "mine"), tmp_path / "extensions", name="my own")
    assert [path.name for path in (tmp_path / "extensions").iterdir()] == ["my own"]


@pytest.mark.parametrize(
    ("source", "name", "branch", "words"),
    [
        ("", "", "", "begins with https"),
        ("ext::sh -c touch% /tmp/x", "x", "", "begins with https"),
        ("file:///etc", "x", "", "begins with https"),
        ("ssh://-oProxyCommand=x/y", "x", "", "begins with https"),
        ("--upload-pack=touch /tmp/x", "x", "", "no folder of the server"),
        ("relative/folder", "x", "", "no folder of the server"),
        ("https://127.0.0.1:9/a/..", "", "", "cannot be the name"),
        ("https://127.0.0.1:9/a", "../../out", "", "cannot be the name"),
        ("https://127.0.0.1:9/a", "a", "--upload-pack=x", "no name of a branch"),
        ("https://127.0.0.1:9/a.git", "", "", "git clone failed"),
    ],
)
def test_what_cannot_be_installed_is_said_and_leaves_nothing(tmp_path: Path, source: str, name: str, branch: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        installing.install(source, tmp_path / "extensions", name=name, branch=branch)
    assert not list((tmp_path / "extensions").glob("*")) if (tmp_path / "extensions").exists() else True


def test_an_index_in_the_data_folder_is_read_and_texts_of_strangers_stay_texts(tmp_path: Path) -> None:
    entries = [
        {"name": "<b>One", "url": "https://a.b/one", "description": "</td>", "tags": ["tab", 7]},
        {"name": "Two", "url": "javascript:alert(1)"},
        {"name": 3, "url": "https://a.b/three"},
        "no entry",
        {"name": "Four", "url": "https://a.b/');alert('"},
    ]
    (tmp_path / "index.json").write_text(json.dumps({"extensions": entries}))
    assert [one.name for one in installing.read_index("index.json", tmp_path)] == ["<b>One", "Four"]
    for source in ("../index.json", "/etc/passwd", "nothing.json", "", "ftp://a.b/index.json"):
        with pytest.raises(RequestError, match="give an address"):
            installing.read_index(source, tmp_path)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(RequestError, match="no index"):
        installing.read_index("bad.json", tmp_path)
    with pytest.raises(RequestError, match="Without internet"):
        installing.read_index("http://127.0.0.1:9/index.json", tmp_path)


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "served") as app:
        yield app
        installed.forget()


def test_the_tab_says_what_was_done(app: Application, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    handlers = ExtensionsHandlers(app)
    assert "Installed into" in handlers.install(str(tmp_path / "mine"), "fresh", "")
    assert (app.config.extensions_dir / "fresh").is_dir()
    (app.config.data_dir / "index.json").write_text(
        json.dumps({"extensions": [{"name": "<i>", "url": "https://a.b/x\"onclick='", "description": "cats"}, {"name": "b", "url": "https://a.b/y"}]})
    )
    table, said = handlers.available("index.json", "cats")
    assert "2 extensions" in said and "&lt;i&gt;" in table and "a.b/y" not in table and "<i>" not in table
    update, said = handlers.save_state("now")
    assert "Saved as" in said and len(update["choices"]) == 1
    assert "it counts at the next start" in handlers.restore(handlers.states()[0])
    assert "No extension is a clone" in handlers.check_updates()[1]


def test_other_computers_may_do_nothing(tmp_path: Path) -> None:
    with installed_application(tmp_path / "other", disable_extension_access=True) as remote:
        handlers = ExtensionsHandlers(remote)
        said = (handlers.install(str(tmp_path), "x", ""), handlers.available("index.json", "")[1], handlers.save_state("x")[1], handlers.restore("x"))
        assert all("--enable-insecure-extension-access" in text for text in (*said, handlers.check_updates()[1], handlers.update_all()[1]))
        assert not remote.config.extensions_dir.exists() or not list(remote.config.extensions_dir.iterdir())
