from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backend.devices import link_test
from backend.diffusion_engine.base import _save
from backend.text_processing.embedding_creation import write_embedding
from backend.unfinished_files import is_unfinished_name, replace_content, unfinished_name
from modules.application import build_application
from modules.launch.cmd_args import config_for_tests
from modules.launch.stamp import write_stamp
from modules.pictures.unfinished_files import clear_unfinished, start_clearing
from modules.pictures.writing import temporary_file, write_whole
from modules.settings.options import write_text_atomically

LONG_AGO_S = 1_000_000_000


def leave(path: Path, *, old: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    if old:
        os.utime(path, (LONG_AGO_S, LONG_AGO_S))
    return path


def test_only_this_programs_own_old_files_are_cleared(tmp_path: Path) -> None:
    with temporary_file(tmp_path, "a.png") as (path, _):
        name = path.name
    ours = leave(tmp_path / "sub" / name)
    others = [leave(tmp_path / other) for other in ("a.tmp", ".a.tmp", "notes.0123456789ab.tmp", ".a.0123456789AB.tmp", ".a.0123456789ab.tmp.png")]
    others.append(leave(tmp_path / f"x{name}"))
    others.append(leave(tmp_path / name, old=False))
    (tmp_path / ".folder.0123456789ab.tmp").mkdir()
    assert clear_unfinished([tmp_path, tmp_path / "missing"], before_s=time.time() - 60) == 1
    assert not ours.exists()
    assert all(path.exists() for path in others)


def test_a_start_clears_every_folder_that_is_written_to(tmp_path: Path) -> None:
    config = config_for_tests(tmp_path)
    app = build_application(config)
    folders = [
        config.outputs_dir / "txt2img-images" / "day",
        config.data_dir / "cache",
        config.settings_file.parent,
        config.embeddings_dirs[0] / "sub",
    ]
    folders += [config.ckpt_dirs[0], config.lora_dirs[0] / "sub", config.vae_dirs[0], config.controlnet_dirs[0]]
    left = [leave(unfinished_name(folder / "a.png")) for folder in folders]
    others = [leave(config.lora_dirs[0] / "a.safetensors"), leave(tmp_path / "mine" / ".a.0123456789ab.tmp")]
    start_clearing(app).join()
    assert [path for path in left if path.exists()] == []
    assert all(path.exists() for path in others)


class Killed(BaseException):
    """Simulates `kill -9`: nothing of the writer runs afterwards."""


def _links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_test._cache, "path", folder / "links.json")
    link_test._write_cache({})


def _embedding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_embedding(folder, "cat", {"clip_l": torch.ones(1, 4)}, overwrite=False, sd_checkpoint=None, sd_checkpoint_name=None)


def _pair_of_embeddings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"clip_l": torch.ones(1, 4), "clip_g": torch.ones(1, 6)}
    write_embedding(folder, "cat", tables, overwrite=False, sd_checkpoint=None, sd_checkpoint_name=None)


WRITERS: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "settings, styles, descriptions, caches": lambda folder, _: write_text_atomically(folder / "config.json", "{}"),
    "stamp of installs": lambda folder, _: write_stamp(folder / "webui-installed.json", {"a": "b"}),
    "verdicts on links": _links,
    "profiles": lambda folder, _: replace_content(folder / "profile.json", b"{}"),
    "embedding": _embedding,
    "embedding of two encoders": _pair_of_embeddings,
    "checkpoint": lambda folder, _: _save({"a": torch.ones(2)}, folder / "a.safetensors", {}),
    "pictures and zips": lambda folder, _: write_whole(lambda file: file.write(b"x"), [folder / "a.zip"]),
    "a name as long as names may be": lambda folder, _: write_text_atomically(folder / ("\U0001f98a" * 63), "x"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_any_writer_leaves_when_killed_is_cleared(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(Path, "replace", die)
        dying.setattr(os, "link", die)
        dying.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Killed):
            WRITERS[kind](tmp_path, monkeypatch)
    (left,) = tmp_path.iterdir()
    os.utime(left, (LONG_AGO_S, LONG_AGO_S))
    assert clear_unfinished([tmp_path], before_s=time.time() - 60) == 1
    assert not left.exists()


@pytest.mark.parametrize("kind", WRITERS)
def test_no_writer_leaves_anything_else(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS[kind](tmp_path, monkeypatch)
    (written,) = tmp_path.iterdir()
    assert not is_unfinished_name(written.name)


def test_a_write_that_fails_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.json"
    replace_content(path, b"before")

    def crash(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        replace_content(path, b"after")
    assert path.read_bytes() == b"before"
    assert [one.name for one in tmp_path.iterdir()] == ["profile.json"]
