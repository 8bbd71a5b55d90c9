"""The version string, parsed the ways clients and extensions parse Forge's."""

from __future__ import annotations

import re
from pathlib import Path

import packaging.version
import pytest

from modules.infotext.parameters import parse_generation_parameters
from modules.infotext.text import build_infotext
from modules.infotext.versions import backcompat, parse_version
from modules.launch import start, version
from modules_forge import forge_version

TEXT = version.program_version()


def test_it_says_which_program_it_is() -> None:
    project = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert (f'name = "{version.NAME}"' in project, f'version = "{version.VERSION}"' in project) == (True, True)
    assert TEXT.endswith(f"-{version.NAME}-{version.VERSION}")


def test_extensions_take_it_for_forge() -> None:
    """sd-webui-lora-block-weight, -regional-prompter and -supermerger check the first two letters; others compare forge_version."""
    assert start.git_tag()[:2] == "f2"
    assert forge_version.version.startswith("2.") and "1.10.1" in forge_version.version


def test_clients_find_forges_and_a1111s_version_in_it() -> None:
    found = re.fullmatch(r"f(\d+\.\d+\.\d+)v(\d+\.\d+\.\d+)-(.+)", TEXT)
    assert found is not None and found.groups() == ("2.0.1", "1.10.1", f"{version.NAME}-{version.VERSION}")
    assert parse_version(TEXT) == (1, 10, 1, 0)


def test_a1111_reads_no_old_version_in_it() -> None:
    """A1111 compares what packaging parses, up to the second hyphen if there is one; what packaging rejects sets no old defaults."""
    for text in (TEXT, "-".join(TEXT.split("-")[:2]), TEXT.split("-", maxsplit=1)[0]):
        with pytest.raises(packaging.version.InvalidVersion):
            packaging.version.parse(text)


def test_a_picture_of_this_version_is_pasted_as_it_was_made() -> None:
    text = build_infotext("[a:b:0.5]", "", {"Steps": 1, "Sampler": "DDIM", "Seed": 1, "Version": TEXT})
    assert f"Version: {TEXT}" in text
    params = parse_generation_parameters(text)
    assert params["Version"] == TEXT
    before = dict(params)
    backcompat(params)
    assert params == before


def test_a_clone_adds_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_git", lambda *arguments: "0123abc")
    assert start.git_tag() == f"{TEXT}-g0123abc"


def test_without_git_there_is_still_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.shutil, "which", lambda name: None)
    assert start.git_tag() == TEXT
