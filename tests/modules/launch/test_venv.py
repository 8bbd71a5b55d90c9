"""Where the virtual environment's Python is, whether this process is inside one, and the errors if it cannot be created."""

from __future__ import annotations

from pathlib import Path

import pytest

from modules.launch import venv
from modules.launch.errors import SetupError
from modules.launch.venv import choose_dir, is_inside, make_venv, python_path, run_inside


@pytest.mark.parametrize(
    ("environ", "prefix", "base_prefix", "inside"),
    [
        ({}, "/usr", "/usr", False),
        ({}, "/home/a/venv", "/usr", True),
        ({"CONDA_PREFIX": "/conda/envs/sd", "CONDA_DEFAULT_ENV": "sd"}, "/conda/envs/sd", "/conda/envs/sd", True),
        ({"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base"}, "/conda", "/conda", False),
        ({"CONDA_PREFIX": "/conda/envs/sd", "CONDA_DEFAULT_ENV": "sd"}, "/usr", "/usr", False),
    ],
)
def test_inside(environ: dict[str, str], prefix: str, base_prefix: str, inside: bool) -> None:
    assert is_inside(environ, prefix, base_prefix) is inside


def test_python_lies_where_each_system_puts_it() -> None:
    assert python_path(Path("v"), windows=False).parts[-2:] == ("bin", "python")
    assert python_path(Path("v"), windows=True).parts[-2:] == ("Scripts", "python.exe")


def test_the_folder_can_be_chosen_or_declined(tmp_path: Path) -> None:
    assert choose_dir(tmp_path, {}) == tmp_path / "venv"
    assert choose_dir(tmp_path, {"VENV_DIR": "other"}) == tmp_path / "other"
    assert choose_dir(tmp_path, {"VENV_DIR": "/elsewhere"}) == Path("/elsewhere")
    assert choose_dir(tmp_path, {"VENV_DIR": "-"}) is None


def failing_python(folder: Path, message: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nmkdir -p '{folder / 'venv' / 'bin'}'\necho '{message}' >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


def test_a_venv_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    python = failing_python(tmp_path, "Error: ensurepip is not available")
    with pytest.raises(SetupError, match="python3-venv"):
        make_venv(tmp_path / "venv", python)
    assert not (tmp_path / "venv").exists()


def test_what_was_there_before_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "kept").touch()
    with pytest.raises(SetupError, match="the disk is full"):
        make_venv(tmp_path / "venv", failing_python(tmp_path, "No space left on device"))
    assert (tmp_path / "venv" / "kept").exists()


def test_an_environment_whose_python_is_gone_is_named(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/no/such/python\n")
    python.chmod(0o755)
    with pytest.raises(SetupError, match="Delete that folder"):
        make_venv(tmp_path / "venv")


def test_going_inside_twice_is_no_loop(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="does not run inside"):
        run_inside(tmp_path, Path("launch.py"), [], {venv.INSIDE_MARK: "1"})


def test_the_same_script_and_arguments_go_on_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(venv.os, "execve", lambda *what: called.append(what))
    monkeypatch.setattr(venv.subprocess, "call", lambda command, env: 7)
    run_inside(tmp_path, Path("launch.py"), ["--api"], {"A": "1"})
    assert called == [
        (str(tmp_path / "bin" / "python"), [str(tmp_path / "bin" / "python"), "launch.py", "--api"], {"A": "1", "WEBUI_INSIDE_VENV": "1"})
    ]


def test_windows_keeps_the_first_process_and_hands_on_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    python = tmp_path / "Scripts" / "python.exe"
    monkeypatch.setattr(venv, "python_path", lambda venv_dir: python)
    monkeypatch.setattr(venv, "_can_replace_process", lambda: False)
    monkeypatch.setattr(venv.subprocess, "call", lambda command, env: called.append(command) or 7)
    assert run_inside(tmp_path, Path("launch.py"), ["--api"], {}) == 7
    assert called == [[str(python), "launch.py", "--api"]]
