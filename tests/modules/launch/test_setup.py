"""The order of setup and its stamp, with pip replaced by a list of calls. `tests/test_launch.py` uses the real one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from modules.launch import pip as launch_pip
from modules.launch import setup as launch_setup
from modules.launch.errors import SetupError
from modules.launch.setup import Setup, install_packages, install_xformers, runtime_file
from modules.launch.stamp import fingerprint, read_stamp, write_stamp


class FakePip:
    """What is installed, and what was requested."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
        self.versions = versions
        self.calls: list[list[str]] = []
        self.fails = False
        monkeypatch.setattr(launch_pip, "installed_version", self.versions.get)
        monkeypatch.setattr(launch_pip, "run_pip", self.run)

    def run(self, arguments: list[str], *, asked: str, **_: object) -> None:
        if self.fails:
            raise SetupError(f"Installing {asked} failed.")
        self.calls.append(arguments)
        listed = Path(arguments[arguments.index("-r") + 1]).read_text().split() if "-r" in arguments else []
        for word in [*arguments[1:], *listed]:
            name, equal, version = word.partition("==")
            if equal:
                self.versions[name] = version


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    (tmp_path / "runtime.txt").write_text("torch==2.0\ntiny==1\n")
    (tmp_path / "test.txt").write_text("pytest==1\n")
    (tmp_path / "prefix").mkdir()
    return Setup(requirement_files=(tmp_path / "runtime.txt",), environ={}, prefix=tmp_path / "prefix")


def test_torch_comes_first_and_only_once(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch)
    assert install_packages(setup) is True
    assert [call[:2] for call in pip.calls] == [["install", "torch==2.0"], ["install", "--prefer-binary"]]
    assert setup.constraints_path.read_text() == "torch==2.0\n"
    assert install_packages(setup) is False
    assert len(pip.calls) == 2


def test_the_test_set_up_covers_the_other(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch)
    both = dataclasses.replace(setup, requirement_files=(*setup.requirement_files, setup.prefix.parent / "test.txt"))
    assert install_packages(both) is True
    assert install_packages(setup) is False
    assert install_packages(both) is False
    assert len(pip.calls) == 2


def test_a_torch_that_is_there_stays_whatever_its_build(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch, torch="2.0+cpu")
    install_packages(setup)
    assert [call[:2] for call in pip.calls] == [["install", "--prefer-binary"]]
    assert setup.constraints_path.read_text() == "torch==2.0+cpu\n"


def test_another_build_is_installed_when_asked_for(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch)
    install_packages(setup)
    install_packages(dataclasses.replace(setup, environ={"TORCH_INDEX_URL": "U"}))
    assert pip.calls[2:4] == [["uninstall", "--yes", "torch"], ["install", "torch==2.0", "--extra-index-url", "U"]]
    num_calls = len(pip.calls)
    assert install_packages(setup) is False
    assert len(pip.calls) == num_calls


def test_a_failure_leaves_no_stamp(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch)
    install_packages(setup)
    pip.fails = True
    with pytest.raises(SetupError):
        install_packages(dataclasses.replace(setup, reinstall_torch=True))
    assert read_stamp(setup.stamp_path) == {}


def test_skip_install_calls_no_pip(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch)
    skipping = dataclasses.replace(setup, skip_install=True, xformers=True)
    assert install_packages(skipping) is False
    install_xformers(skipping)
    assert pip.calls == []


def test_a_disk_that_is_too_full_is_said_before_torch_is_fetched(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch)
    monkeypatch.setattr(launch_setup, "MIN_FREE_BYTES", 2**62)
    with pytest.raises(SetupError, match="GB are free at"):
        install_packages(setup)
    assert pip.calls == []


def test_xformers_fits_torch_and_comes_alone(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch, torch="2.13.0+cpu")
    install_xformers(setup)
    install_xformers(setup)
    assert pip.calls == [["install", "--no-deps", "--prefer-binary", "xformers==0.0.35"]]
    install_xformers(dataclasses.replace(setup, reinstall_xformers=True))
    assert pip.calls[1][3:] == ["--force-reinstall", "xformers==0.0.35"]
    pip.versions["torch"] = "2.9.1"
    install_xformers(setup)
    assert pip.calls[2][-1] == "xformers==0.0.33.post2"


def test_without_a_fitting_xformers_one_line_is_said(setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pip = FakePip(monkeypatch, torch="1.0")
    install_xformers(setup)
    pip.versions["torch"], pip.fails = "2.13.0", True
    install_xformers(setup)
    assert pip.calls == []
    assert [record.levelname for record in caplog.records if "own attention is used" in record.getMessage()] == ["WARNING", "WARNING"]


def test_the_list_of_packages_can_be_another_one(tmp_path: Path) -> None:
    assert runtime_file(tmp_path, {}).name == "requirements_versions.txt"
    assert runtime_file(tmp_path, {"REQS_FILE": "mine.txt"}) == tmp_path / "mine.txt"


def test_the_fingerprint_changes_with_what_matters_only() -> None:
    base = fingerprint({"a": b"x\n", "b": b"y"}, "c")
    assert fingerprint({"b": b"y", "a": b"x\r\n"}, "c") == base
    assert len({base, fingerprint({"a": b"x\n", "b": b"z"}, "c"), fingerprint({"a": b"x\n", "b": b"y"}, "d"), fingerprint({"a": b"x\n"}, "c")}) == 4


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"\xff"])
def test_a_stamp_that_cannot_be_read_is_none(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "s").write_bytes(content)
    assert read_stamp(tmp_path / "s") == {}


def test_a_stamp_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_stamp(tmp_path / "s", {"a": "1"})
    assert read_stamp(tmp_path / "s") == {"a": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
