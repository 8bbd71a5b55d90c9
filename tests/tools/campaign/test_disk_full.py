"""Short version of the full-disk campaign: no mount, no server; shows that its checks can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.campaign import disk_full
from tools.campaign.disk_full import Findings


class Answering:
    """A server with one picture that returns `comments` and writes nothing."""

    def __init__(self, comments: str) -> None:
        self.comments = comments

    def txt2img(self, **changes: Any) -> dict[str, Any]:
        return {"images": ["x"], "info": json.dumps({"comments": self.comments})}


@pytest.mark.parametrize(("comments", "num_faults"), [("Not saved: cannot write a", 0), ("", len(disk_full.FORMATS))])
def test_a_picture_without_a_file_must_be_said(comments: str, num_faults: int, tmp_path: Path) -> None:
    found = Findings()
    disk_full.try_pictures(found, Answering(comments), tmp_path, "full")  # type: ignore[arg-type]
    assert (len(found.rows), len(found.faults)) == (len(disk_full.FORMATS), num_faults)


def test_styles_stay_whole_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Findings()
    disk_full.try_styles(found, tmp_path, "with room", fits=True)

    def has_no_room(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modules.prompts.styles.write_text_atomically", has_no_room)
    disk_full.try_styles(found, tmp_path, "full", fits=False)
    assert found.faults == []


def test_changed_and_half_written_files_are_seen(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    before = disk_full.digests(tmp_path)
    (tmp_path / "old.txt").write_text("new")
    (tmp_path / ".a.png.0123456789ab.tmp").touch()
    found = Findings()
    disk_full._same(found, "files", before, tmp_path)
    assert len(found.faults) == 1 and "1 old files changed, 1 half-written" in found.faults[0]


def test_where_nothing_can_be_mounted_it_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["disk_full"])
    monkeypatch.setattr(disk_full, "reason_not_to_run", lambda: "this is a test")
    assert disk_full.main() == 0
    assert capsys.readouterr().out == "skipped because this is a test\n"
