from __future__ import annotations

import hashlib
from pathlib import Path

from modules.cache import FileCache
from modules.hashes import HashStore, addnet_hash_safetensors


def test_a_hash_is_computed_once_and_remembered_between_runs(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"content")
    expected = hashlib.sha256(b"content").hexdigest()
    assert HashStore(FileCache(tmp_path / "cache")).sha256(path, "checkpoint/file") == expected
    later = HashStore(FileCache(tmp_path / "cache"))
    assert later.known_sha256(path, "checkpoint/file") == expected
    assert later.known_sha256(path, "other title") is None


def test_with_no_hashing_nothing_is_computed_or_used(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"content")
    HashStore(FileCache(tmp_path / "cache")).sha256(path, "a")
    off = HashStore(FileCache(tmp_path / "cache"), enabled=False)
    assert (off.sha256(path, "a"), off.known_sha256(path, "a")) == (None, None)


def test_a_broken_cache_file_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hashes.json").write_text("{", encoding="utf8")
    path = tmp_path / "file.bin"
    path.write_bytes(b"x")
    assert HashStore(FileCache(tmp_path / "cache")).sha256(path, "a") == hashlib.sha256(b"x").hexdigest()


def test_the_addnet_hash_leaves_the_header_out(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes((3).to_bytes(8, "little") + b"{ }" + b"tensors")
    with path.open("rb") as file:
        assert addnet_hash_safetensors(file) == hashlib.sha256(b"tensors").hexdigest()
