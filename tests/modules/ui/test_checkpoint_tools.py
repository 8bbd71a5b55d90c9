"""The Checkpoint tools tab: a conversion by the names that the page shows, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.checkpoint_converter import PARTS as ENGINE_PARTS
from backend.checkpoint_converter import conversion_types
from modules.application import Application
from modules.ui.checkpoint_tools import PARTS, TYPES, ToolsHandlers
from tests.support.applications import installed_application


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path) as app:
        folder = app.config.ckpt_dirs[0]
        folder.mkdir(parents=True)
        save_file({"a.weight": torch.ones(128, 128), "a.bias": torch.ones(4)}, folder / "one.safetensors")
        yield app


def test_the_choices_are_the_engines() -> None:
    assert set(TYPES) == set(conversion_types()) and PARTS == ENGINE_PARTS


def test_a_file_is_converted_next_to_its_source(app: Application) -> None:
    handlers, shares = ToolsHandlers(app), []
    assert handlers.file_names() == ["one.safetensors"]
    said = handlers.convert(["one.safetensors"], "fp16", "all", [], 1.0, "half", progress=lambda share, desc: shares.append(share))
    assert "half.safetensors: 0.00 GB" in said and "error" not in said and shares[-1] == 1.0
    assert load_file(app.config.ckpt_dirs[0] / "half.safetensors")["a.weight"].dtype == torch.float16
    assert "half.safetensors" in handlers.file_names()


@pytest.mark.parametrize(
    ("sources", "to", "loras", "name", "words"),
    [
        (["one.safetensors"], "fp16", [], "../out", "without folders"),
        (["one.safetensors"], "fp16", [], "", "without folders"),
        (["one.safetensors"], "fp16", [], "one", "exists already"),
        (["nowhere"], "fp16", [], "new", "does not exist"),
        ([], "fp16", [], "new", "No file was given"),
        (["one.safetensors"], "fp16", ["nowhere"], "new", "LoRA &#x27;nowhere&#x27; does not exist"),
        (["one.safetensors"], "x", [], "new", "is unknown"),
    ],
)
def test_what_cannot_be_converted_is_said(app: Application, sources: list[str], to: str, loras: list[str], name: str, words: str) -> None:
    said = ToolsHandlers(app).convert(sources, to, "all", loras, 1.0, name, progress=lambda share, desc: None)
    assert words in said and "error" in said
    assert [path.name for path in app.config.ckpt_dirs[0].iterdir()] == ["one.safetensors"]


def test_other_computers_may_not_convert(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "config", dataclasses.replace(app.config, disable_extension_access=True))
    assert "from other computers" in ToolsHandlers(app).convert(["one.safetensors"], "fp16", "all", [], 1.0, "new")
