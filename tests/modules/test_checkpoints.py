from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from modules.cache import FileCache
from modules.checkpoints import CheckpointInfo, CheckpointRegistry, find_checkpoint_files, read_safetensors_metadata
from modules.errors import NoCheckpointError
from modules.hashes import HashStore, partial_hash


def write_safetensors(path: Path, metadata: dict[str, str] | None = None, filler: bytes = b"") -> Path:
    header = json.dumps({"__metadata__": metadata or {}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + filler)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "Stable-diffusion"
    write_safetensors(folder / "alpha.safetensors", filler=b"a")
    write_safetensors(folder / "sub" / "beta 10.safetensors", filler=b"b")
    write_safetensors(folder / "sub" / "beta 9.safetensors", filler=b"c" * 0x110000)
    (folder / "old.ckpt").write_bytes(b"pickle")
    write_safetensors(folder / "alpha.vae.safetensors")
    (folder / "notes.txt").write_text("no", encoding="utf8")
    return folder


def make_registry(root: Path, *, hashing: bool = True) -> CheckpointRegistry:
    registry = CheckpointRegistry([root], HashStore(FileCache(root.parent / "cache"), enabled=hashing))
    registry.refresh()
    return registry


def test_files_are_found_in_natural_order_without_vae_files(root: Path) -> None:
    assert [info.name for info in make_registry(root)] == ["alpha.safetensors", "old.ckpt", "sub/beta 9.safetensors", "sub/beta 10.safetensors"]


def test_a_linked_folder_is_entered_once(root: Path) -> None:
    (root / "link").symlink_to(root, target_is_directory=True)
    assert len(find_checkpoint_files(root)) == 4


def test_the_title_gains_the_hash_when_it_is_known(root: Path) -> None:
    registry = make_registry(root)
    info = registry.find("alpha")
    assert info is not None
    assert (info.title, info.shorthash) == ("alpha.safetensors", None)
    sha256 = hashlib.sha256((root / "alpha.safetensors").read_bytes()).hexdigest()
    assert info.calculate_shorthash() == sha256[:10]
    assert info.title == f"alpha.safetensors [{sha256[:10]}]"
    assert info.short_title == f"alpha [{sha256[:10]}]"
    again = make_registry(root).find("alpha")
    assert again is not None
    assert again.sha256 == sha256


def test_a_changed_file_has_another_hash(root: Path) -> None:
    registry = make_registry(root)
    info = registry.find("alpha")
    assert info is not None
    info.calculate_shorthash()
    write_safetensors(root / "alpha.safetensors", filler=b"longer")
    registry.refresh()
    changed = registry.find("alpha")
    assert changed is not None
    assert changed.sha256 is None
    assert changed.calculate_shorthash() != info.shorthash


def test_no_hashing_leaves_titles_bare(root: Path) -> None:
    info = make_registry(root, hashing=False).find("alpha")
    assert info is not None
    assert info.calculate_shorthash() is None
    assert info.title == "alpha.safetensors"


def test_a_checkpoint_is_found_by_title_name_stem_hash_and_path(root: Path) -> None:
    registry = make_registry(root)
    info = registry.find("beta 9")
    assert info is not None
    info.calculate_shorthash()
    texts = [info.title, info.short_title, info.name, "beta 9.safetensors", "sub/beta 9", "sub_beta 9", info.hash, info.sha256, info.shorthash]
    texts += [info.filename, "BETA 9", "beta 9.safetensors [0123456789]", "eta 9"]
    assert [registry.find(text) for text in texts] == [info] * len(texts)


@pytest.mark.parametrize("text", ["gamma", "", "   ", None, "[abc]"])
def test_an_unknown_name_finds_nothing(root: Path, text: str | None) -> None:
    assert make_registry(root).find(text) is None


def test_an_exact_name_beats_a_part_of_another(root: Path) -> None:
    write_safetensors(root / "alpha plus.safetensors", filler=b"d")
    info = make_registry(root).find("alpha")
    assert info is not None
    assert info.name == "alpha.safetensors"


def test_refresh_keeps_what_did_not_change_and_drops_what_is_gone(root: Path) -> None:
    registry = make_registry(root)
    kept = registry.find("alpha")
    (root / "old.ckpt").unlink()
    registry.refresh()
    assert registry.find("alpha") is kept
    assert registry.find("old") is None


def test_without_checkpoints_the_error_names_folder_and_kinds(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match=r"\.safetensors") as raised:
        make_registry(tmp_path / "empty").first()
    assert str(tmp_path / "empty") in str(raised.value)


def test_metadata_is_read_from_the_header_alone(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"ss_tag": '{"x": 1}', "plain": "text"})
    assert read_safetensors_metadata(path) == {"ss_tag": {"x": 1}, "plain": "text"}
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 64)
    assert read_safetensors_metadata(tmp_path / "broken.safetensors") == {}


def test_the_old_hash_is_that_of_64_kib_at_one_mib(tmp_path: Path) -> None:
    path = tmp_path / "big.ckpt"
    path.write_bytes(os.urandom(0x100000) + b"\x07" * 0x20000)
    assert partial_hash(path) == hashlib.sha256(b"\x07" * 0x10000).hexdigest()[:8]
    assert partial_hash(tmp_path / "gone.ckpt") == "NOFILE"


def test_a_file_outside_the_folders_keeps_its_own_name(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "elsewhere" / "x.safetensors")
    info = CheckpointInfo(path, roots=[tmp_path / "models"], store=HashStore(FileCache(tmp_path / "cache")))
    assert info.name == "x.safetensors"
