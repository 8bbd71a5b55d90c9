from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from backend.model_folders import say_once
from modules.checkpoints.cache import FileCache
from modules.checkpoints.hashes import HashStore, partial_hash
from modules.checkpoints.listing import CheckpointInfo, CheckpointRegistry, find_checkpoint_files, read_safetensors_metadata
from modules.errors import NoCheckpointError, UnknownCheckpointError
from modules.launch.cmd_args import config_for_tests
from tests.modules.api.conftest import write_checkpoint_header


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
    texts += [info.filename, "BETA 9", "beta 9.safetensors [0123456789]", "sub\\beta 9.safetensors", "Sub\\beta 9.safetensors [0123456789]"]
    texts += [f"renamed.safetensors [{info.shorthash}]", f"x\\renamed.safetensors [{info.hash}]", str(info.sha256)[:8].upper()]
    assert [registry.find(text) for text in texts] == [info] * len(texts)


@pytest.mark.parametrize(
    "text", ["gamma", "", "   ", None, "[abc]", "eta 9", "9", "e3b0c442", "e3b0c44298fc", "alpha.safetensors [", "a\0b", "a" * 5000]
)
def test_an_unknown_name_finds_nothing(root: Path, text: str | None) -> None:
    assert make_registry(root).find(text) is None


def test_a_piece_of_a_hash_names_no_file_and_a_new_file_is_seen(root: Path) -> None:
    registry = make_registry(root)
    info = registry.find("alpha")
    assert info is not None
    info.calculate_shorthash()
    piece = str(info.shorthash)[3:5]
    with pytest.raises(UnknownCheckpointError, match="does not exist"):
        registry.require(piece)
    write_safetensors(root / f"{piece}.safetensors", filler=b"new")
    assert registry.require(piece).name == f"{piece}.safetensors"


def test_a_name_beats_the_hash_of_another(root: Path) -> None:
    registry = make_registry(root)
    info = registry.find("alpha")
    assert info is not None
    info.calculate_shorthash()
    named = write_safetensors(root / f"{info.shorthash}.safetensors", filler=b"d")
    registry.refresh()
    assert [registry.find(str(info.shorthash)).path, registry.find(str(info.sha256)).path] == [named, info.path]  # type: ignore[union-attr]


def test_a_file_beats_one_of_the_same_name_in_a_folder(root: Path) -> None:
    write_safetensors(root / "a folder" / "alpha.safetensors")
    info = make_registry(root).find("alpha")
    assert info is not None
    assert info.name == "alpha.safetensors"


def test_an_unknown_name_is_told_the_nearest(root: Path) -> None:
    with pytest.raises(UnknownCheckpointError, match=r"checkpoint 'alfa' does not exist; nearest are 'alpha.safetensors' \(of 4\)"):
        make_registry(root).require("alfa")


def test_an_empty_file_has_no_hash(root: Path) -> None:
    (root / "empty.safetensors").write_bytes(b"")
    info = make_registry(root).find("empty")
    assert info is not None
    assert (info.calculate_shorthash(), info.title) == (None, "empty.safetensors")


@pytest.mark.parametrize("header", [b'{"a":' * 1000 + b"1" + b"}" * 1000, b'{"__metadata__": {"a": "\xff"}}', b"[" * 500])
def test_a_header_that_cannot_be_read_is_named_and_others_go_on(root: Path, header: bytes, caplog: pytest.LogCaptureFixture) -> None:
    odd = root / "1\u00b23.safetensors"
    odd.write_bytes(len(header).to_bytes(8, "little") + header)
    say_once.cache_clear()
    registry = make_registry(root)
    assert [info.metadata for info in registry] == [{}] * 5
    assert [record.message for record in caplog.records if odd.name in record.message] != []


def test_metadata_comes_out_as_json_can_say_it(tmp_path: Path) -> None:
    odd = {"number": "[1e400, NaN, 1]", "deep": "[" * 1000 + "]" * 1000, "half": "\ud800"}
    metadata = read_safetensors_metadata(write_safetensors(tmp_path / "a.safetensors", odd))
    assert metadata == {"number": ["1e400", "NaN", 1], "deep": odd["deep"], "half": "?"}
    json.dumps(metadata, allow_nan=False, ensure_ascii=False).encode()


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


def test_the_demo_is_there_as_long_as_nothing_else_is(tmp_path: Path) -> None:
    from modules.application import build_application

    app = build_application(config_for_tests(tmp_path, use_demo=True))
    try:
        assert app.checkpoints.titles()[0].startswith("demo-")
        write_checkpoint_header(tmp_path / "models" / "Stable-diffusion" / "mine.safetensors")
        app.checkpoints.refresh()
        assert [title.split(" ")[0] for title in app.checkpoints.titles()] == ["mine.safetensors"]
    finally:
        app.close()
