"""The Checkpoint Merger tab: a merge by the names that the page shows, and what is refused. Numbers: tests/backend/test_checkpoint_merger.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from backend.checkpoint_merger import METHODS as ENGINE_METHODS
from modules.application import Application
from modules.ui.checkpoint_merger import METHODS, MergerHandlers
from tests.support.applications import installed_application
from tests.support.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with installed_application(Path(tmp_path_factory.mktemp("merger"))) as app:
        folder = app.config.ckpt_dirs[0]
        for seed, name in enumerate("ab"):
            write_checkpoint(folder / f"{name}.safetensors", "sd15", seed=seed, is_shallow=True)
        yield app


def merge(app: Application, *models: str | None, **job: Any) -> str:
    names = (*models, None, None)[:3]
    settings = {"method": "Weighted sum", "multiplier": 0.25, "to": "fp32", "name": "new", "progress": lambda share, desc: None, **job}
    return MergerHandlers(app).merge(names, **settings)


def test_the_methods_are_the_engines() -> None:
    assert METHODS == ENGINE_METHODS


def test_a_merge_is_written_beside_its_sources_and_reports_how_far_it_is(app: Application) -> None:
    shares: list[float] = []
    said = merge(app, "a.safetensors", "b.safetensors", name="", progress=lambda share, desc: shares.append(share))
    assert "0.75(a) + 0.25(b).safetensors" in said and "error" not in said
    assert shares == sorted(shares) and shares[-1] == 1.0
    folder = app.config.ckpt_dirs[0]
    key = "model.diffusion_model.out.2.weight"
    a, b, mixed = (load_file(folder / f"{name}.safetensors")[key].float() for name in ("a", "b", "0.75(a) + 0.25(b)"))
    assert torch.allclose(mixed, 0.75 * a + 0.25 * b, atol=1e-6)
    assert "sd_merge_recipe" in MergerHandlers(app).metadata_html(("0.75(a) + 0.25(b).safetensors",))


@pytest.mark.parametrize(
    ("models", "job", "words"),
    [
        ((None,), {}, "Choose the first model"),
        (("a.safetensors",), {}, "needs a second model"),
        (("a.safetensors", "x"), {}, "does not exist"),
        (("a.safetensors", "b.safetensors"), {"name": "../x"}, "without folders"),
        (("a.safetensors", "b.safetensors"), {"name": "a"}, "exists already"),
        (("a.safetensors", "b.safetensors"), {"multiplier": 99}, "Multiplier 99"),
        (("a.safetensors", "b.safetensors"), {"method": "Add difference"}, "needs a third model"),
        (("a.safetensors", "b.safetensors"), {"vae": "nowhere"}, "does not exist"),
    ],
)
def test_what_cannot_be_merged_is_said(app: Application, models: tuple[str | None, ...], job: dict[str, Any], words: str) -> None:
    before = sorted(app.config.ckpt_dirs[0].iterdir())
    said = merge(app, *models, **job)
    assert words in said and "error" in said
    assert sorted(app.config.ckpt_dirs[0].iterdir()) == before


def test_other_computers_may_not_merge(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "config", dataclasses.replace(app.config, disable_extension_access=True))
    assert "--enable-insecure-extension-access" in merge(app, "a.safetensors", "b.safetensors")
