from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from modules.app_config import AppConfig
from modules.application import build_application
from modules.image_writing import temporary_file
from modules.options import write_text_atomically
from modules.unfinished_files import clear_unfinished, start_clearing

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


def test_a_start_clears_outputs_and_what_lies_beside_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts: list[str] = []
    replace = Path.replace

    def remember(self: Path, target: Path) -> Path:
        drafts.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", remember)
    write_text_atomically(tmp_path / "config.json", "{}")
    app = build_application(AppConfig.for_tests(tmp_path))
    left = [leave(tmp_path / drafts[0]), leave(app.config.outputs_dir / "txt2img-images" / "day" / ".1.png.0123456789ab.tmp")]
    model = leave(tmp_path / "models" / ".model.0123456789ab.tmp")
    start_clearing(app).join()
    assert [path.exists() for path in left] == [False, False]
    assert model.exists() and (tmp_path / "config.json").exists()
