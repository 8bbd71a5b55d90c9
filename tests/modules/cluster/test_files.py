from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from modules.cluster import files
from modules.cluster.files import FileCache, read_part
from modules.cluster.fleet import WorkerRefusesError
from modules.cluster.orders import FileName
from modules.cluster.values import MessageError


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART_BYTES", 10)


def name_of(content: bytes, name: str = "model.safetensors", **changes: Any) -> FileName:
    facts = {"kind": "checkpoint", "name": name, "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return FileName(**{**facts, **changes})


def send(cache: FileCache, file: FileName, source: Path, *, num_parts: int = 99) -> dict[str, Any]:
    answer: dict[str, Any] = {"is_whole": False, **cache.missing([file])[0]}
    for _ in range(num_parts):
        if answer["is_whole"]:
            break
        answer = cache.write_part(file, answer["have_bytes"], read_part(source, answer["have_bytes"]))
    return answer


def test_a_file_that_is_here_already_is_not_sent(tmp_path: Path) -> None:
    own = tmp_path / "models" / "sub"
    own.mkdir(parents=True)
    (own / "model.safetensors").write_bytes(b"123")
    cache = FileCache(tmp_path / "cache", {"checkpoint": [tmp_path / "models"]})
    assert cache.missing([name_of(b"123")]) == []
    assert cache.locate(name_of(b"123")) == own / "model.safetensors"
    assert cache.locate(name_of(b"1234")) is None


def test_a_broken_transfer_goes_on_where_it_ended(tmp_path: Path) -> None:
    content = bytes(range(95))
    source = tmp_path / "source"
    source.write_bytes(content)
    file = name_of(content)
    send(FileCache(tmp_path / "cache", {}, spare_bytes=0), file, source, num_parts=4)
    cache = FileCache(tmp_path / "cache", {}, spare_bytes=0)  # the worker was restarted
    assert cache.missing([file]) == [{"sha256": file.sha256, "have_bytes": 40}]
    assert cache.locate(file) is None
    assert send(cache, file, source) == {"is_whole": True, "have_bytes": 95}
    assert (cache.locate(file) or tmp_path).read_bytes() == content
    assert not list((tmp_path / "cache" / "parts").iterdir())


def test_two_workers_of_a_machine_may_receive_the_same_file_at_once(tmp_path: Path) -> None:
    content = bytes(range(95))
    source = tmp_path / "source"
    source.write_bytes(content)
    file = name_of(content)

    def receive(_: int) -> None:
        cache = FileCache(tmp_path / "cache", {}, spare_bytes=0)  # its own lock, as in a process of its own
        while cache.locate(file) is None:
            for offset in range(0, 95, 10):
                cache.write_part(file, offset, content[offset : offset + 10])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(receive, range(4)))
    assert (FileCache(tmp_path / "cache", {}).locate(file) or tmp_path).read_bytes() == content


def test_a_damaged_file_is_never_used(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 30)
    file = name_of(b"y" * 30)
    cache = FileCache(tmp_path / "cache", {}, spare_bytes=0)
    with pytest.raises(WorkerRefusesError, match="arrived damaged"):
        send(cache, file, source)
    assert cache.missing([file]) == [{"sha256": file.sha256, "have_bytes": 0}]


def test_a_part_at_another_place_changes_nothing(tmp_path: Path) -> None:
    file = name_of(b"a" * 25)
    cache = FileCache(tmp_path / "cache", {}, spare_bytes=0)
    assert cache.write_part(file, 10, b"a" * 10) == {"is_whole": False, "have_bytes": 0}
    assert cache.write_part(file, 0, b"a" * 10) == {"is_whole": False, "have_bytes": 10}
    assert cache.write_part(file, 0, b"a" * 10) == {"is_whole": False, "have_bytes": 10}  # two jobs, or a repeated call
    assert cache.write_part(file, 20, b"a" * 10) == {"is_whole": False, "have_bytes": 10}
    with pytest.raises(WorkerRefusesError, match="cannot be taken"):
        cache.write_part(file, 10, b"a" * 11)


def test_a_full_disk_is_told_before_it_is_full(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", {}, spare_bytes=1 << 62)
    with pytest.raises(WorkerRefusesError, match=r"disk cannot take model\.safetensors: less than .* would stay free"):
        cache.write_part(name_of(b"a" * 5), 0, b"a" * 5)


def test_another_network_of_the_same_name_refuses_the_order(tmp_path: Path) -> None:
    (tmp_path / "Lora").mkdir()
    (tmp_path / "Lora" / "ink.safetensors").write_bytes(b"other")
    cache = FileCache(tmp_path / "cache", {"network": [tmp_path / "Lora"]})
    with pytest.raises(WorkerRefusesError, match=r"another ink\.safetensors \(5 bytes instead of 3\)"):
        cache.missing([name_of(b"abc", "ink.safetensors", kind="network")])


def test_without_hashes_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(WorkerRefusesError, match=r"no checkpoint model\.safetensors, and the front computes no hashes"):
        FileCache(tmp_path, {}).missing([name_of(b"abc", sha256=None)])


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../x"},
        {"name": "a/b"},
        {"name": "a\\b"},
        {"name": ""},
        {"name": ".."},
        {"name": "a\0"},
        {"kind": "../x"},
        {"sha256": "../../x"},
        {"size_bytes": -1},
    ],
)
def test_names_that_are_no_file_names_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(MessageError):
        name_of(b"abc", **changes)


def test_stars_in_a_name_match_only_themselves(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    assert FileCache(tmp_path / "cache", {"checkpoint": [tmp_path]}).locate(name_of(b"abc", "*.safetensors", sha256=None)) is None
