from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from backend.model_folders import find_files, natural_key, say_once


@pytest.fixture(autouse=True)
def forget_what_was_said() -> None:
    say_once.cache_clear()


def make(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_linked_folders_are_entered_once_and_real_names_come_first(tmp_path: Path) -> None:
    real = make(tmp_path / "root" / "sub" / "a.pt")
    outside = make(tmp_path / "elsewhere" / "deep" / "b.pt")
    (tmp_path / "root" / "a link").symlink_to(tmp_path / "root" / "sub")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "root")
    assert find_files(tmp_path / "root", [".pt"]) == [tmp_path / "root" / "linked" / "deep" / "b.pt", real]
    assert outside.samefile(tmp_path / "root" / "linked" / "deep" / "b.pt")


def test_unusable_entries_are_skipped_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = make(tmp_path / "1²3.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.safetensors").symlink_to(tmp_path / "self.safetensors")
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    (tmp_path / "folder.safetensors").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.safetensors")).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert find_files(tmp_path, [".safetensors"]) == [good]
        assert find_files(tmp_path, [".safetensors"]) == [good]
    said = [record.message for record in caplog.records]
    assert len(said) == 5
    for name in ("pipe", "gone", "self", "device", "caf\\udce9"):
        assert sum(f"{name}.safetensors" in message for message in said) == 1


def test_a_file_below_a_folder_whose_name_is_not_utf8_is_left_out(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    make(folder / "a.pt")
    assert find_files(tmp_path, [".pt"]) == []


@pytest.mark.parametrize("folder", ["a\0b", "missing", "x" * 5000])
def test_an_impossible_folder_is_empty(tmp_path: Path, folder: str) -> None:
    assert find_files(tmp_path / folder) == []


def test_numbers_sort_by_value_whatever_their_script_and_length() -> None:
    names = ["b10", "b9", "b²", "1²3", "٣", "b009", "9" * 5000, "B9a", "a"]
    assert sorted(names, key=natural_key) == ["1²3", "9" * 5000, "a", "b9", "b009", "B9a", "b10", "b²", "٣"]
