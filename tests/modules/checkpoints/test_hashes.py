from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from modules.checkpoints.cache import FileCache
from modules.checkpoints.hashes import HashStore, addnet_hash_safetensors


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


@pytest.mark.parametrize("content", [b"{", b'{"a":' * 100_000, b"[]", b"\xff\xfe", b'{"a": 1}', b'{"a": {"path": [], "value": {}}}'])
def test_a_broken_cache_file_is_made_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hashes.json").write_bytes(content)
    path = tmp_path / "file.bin"
    path.write_bytes(b"x")
    assert HashStore(FileCache(tmp_path / "cache")).sha256(path, "a") == hashlib.sha256(b"x").hexdigest()


def test_a_cache_that_is_a_folder_costs_only_what_it_remembers(tmp_path: Path) -> None:
    (tmp_path / "cache" / "hashes.json").mkdir(parents=True)
    path = tmp_path / "file.bin"
    path.write_bytes(b"x")
    assert HashStore(FileCache(tmp_path / "cache")).sha256(path, "a") == hashlib.sha256(b"x").hexdigest()


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\xff" * 100, (2).to_bytes(8, "little") + b"{}"])
def test_a_file_without_content_has_no_hash(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    store = HashStore(FileCache(tmp_path / "cache"))
    assert (store.addnet_sha256(path, "a"), store.known_addnet_sha256(path, "a")) == (None, None)
    assert store.sha256(path, "b") == (hashlib.sha256(content).hexdigest() if content else None)


def test_the_addnet_hash_leaves_the_header_out(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes((3).to_bytes(8, "little") + b"{ }" + b"tensors")
    with path.open("rb") as file:
        assert addnet_hash_safetensors(file) == hashlib.sha256(b"tensors").hexdigest()
