"""Which torch and which xformers are installed, and how pip is called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modules.launch import pip
from modules.launch.errors import SetupError
from modules.launch.pip import has_nvidia_driver, read_requirements, run_pip, split_pip_command, split_torch, torch_command, xformers_requirement


def test_the_line_of_torch_is_told_from_the_others() -> None:
    text = "# torch==1\ntorchsde==0.2\nTorch==2.13.0  # pinned\n\ntorchvision==1\n"
    assert split_torch(text) == ("Torch==2.13.0", ["# torch==1", "torchsde==0.2", "", "torchvision==1"])
    assert split_torch("a==1") == (None, ["a==1"])


@pytest.mark.parametrize(
    ("environ", "platform", "nvidia", "command"),
    [
        ({}, "linux", True, "pip install torch==2"),
        ({}, "linux", False, "pip install torch==2"),
        ({}, "win32", True, f"pip install torch==2 --extra-index-url {pip.TORCH_CUDA_INDEX}"),
        ({}, "win32", False, "pip install torch==2"),
        ({"TORCH_INDEX_URL": "U"}, "linux", False, "pip install torch==2 --extra-index-url U"),
        ({"TORCH_COMMAND": "pip install mine", "TORCH_INDEX_URL": "U"}, "win32", True, "pip install mine"),
    ],
)
def test_torch_command(environ: dict[str, str], platform: str, nvidia: bool, command: str) -> None:
    assert torch_command("torch==2", environ, platform=platform, nvidia=nvidia) == command


@pytest.mark.parametrize("name", ["proc/driver/nvidia/version", "dev/nvidiactl", "dev/dxg"])
def test_an_nvidia_driver_is_known_by_its_files(tmp_path: Path, name: str) -> None:
    assert not has_nvidia_driver(platform="linux", root=tmp_path)
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    assert has_nvidia_driver(platform="linux", root=tmp_path)


@pytest.mark.parametrize(
    ("torch", "requirement"),
    [
        ("2.13.0+cpu", "xformers==0.0.35"),
        ("2.10.1", "xformers==0.0.35"),
        ("2.9.1+cu130", "xformers==0.0.33.post2"),
        ("2.8.0", "xformers==0.0.32.post2"),
        ("2.1.0", None),
    ],
)
def test_the_xformers_that_fits(torch: str, requirement: str | None) -> None:
    assert xformers_requirement(torch, {}) == requirement
    assert xformers_requirement(torch, {"XFORMERS_PACKAGE": "mine"}) == "mine"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("pip install torch --index-url U", ["install", "torch", "--index-url", "U"]),
        ("pip3 install 'a b'", ["install", "a b"]),
        ("python -m pip install torch", ["install", "torch"]),
        ("/usr/bin/python3 -m pip install torch", ["install", "torch"]),
    ],
)
def test_a_pip_command_is_read(command: str, words: list[str]) -> None:
    assert split_pip_command(command) == words


@pytest.mark.parametrize("command", ["", "rm -rf /", "pip", "conda install torch"])
def test_another_command_is_refused(command: str) -> None:
    with pytest.raises(SetupError, match="TORCH_COMMAND"):
        split_pip_command(command)


def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\necho \"$@\" > '{tmp_path / 'called'}'\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(pip.sys, "executable", str(path))


def test_pip_is_called_with_index_and_constraints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(tmp_path, monkeypatch, "exit 0")
    run_pip(["install", "x"], asked="x", log_path=tmp_path / "log", environ={**os.environ, "INDEX_URL": "U"}, constraints=tmp_path / "c")
    assert (tmp_path / "called").read_text().split() == [
        *(
            "-m",
            "pip",
            "install",
            "x",
            "--disable-pip-version-check",
            "--log",
            str(tmp_path / "log"),
            "--index-url",
            "U",
            "--constraint",
            str(tmp_path / "c"),
        ),
    ]


def test_a_full_disk_is_said_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(tmp_path, monkeypatch, f"echo 'OSError: [Errno 28] No space left on device' >> '{tmp_path / 'log'}'\nexit 1")
    with pytest.raises(SetupError, match="the disk is full"):
        run_pip(["install", "x"], asked="x", log_path=tmp_path / "log", environ=os.environ)


def test_an_old_failure_is_not_mistaken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log").write_text("No space left on device")
    fake_python(tmp_path, monkeypatch, "exit 1")
    with pytest.raises(SetupError, match="pip gave up"):
        run_pip(["install", "x"], asked="x", log_path=tmp_path / "log", environ=os.environ)


def test_a_log_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="Installing x"):
        run_pip(["install", "x"], asked="x", log_path=tmp_path / "no" / "log", environ=os.environ)


def test_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="REQS_FILE"):
        read_requirements(tmp_path / "none.txt")
