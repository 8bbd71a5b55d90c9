from __future__ import annotations

from pathlib import Path

from modules.cluster.versions import collect_versions, find_differences, fingerprint, refusal


def write(folder: Path, text: bytes = b"x = 1\n") -> Path:
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "a.py").write_bytes(text)
    return folder


def test_the_same_files_have_the_same_fingerprint_wherever_they_lie(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one" / "modules"), write(tmp_path / "other" / "modules", b"x = 1\r\n")
    (other / "__pycache__").mkdir()
    (other / "__pycache__" / "a.cpython-311.py").write_text("cache")
    (other / "picture.png").write_bytes(b"")
    assert fingerprint([one]) == fingerprint([other])


def test_a_changed_moved_or_further_file_has_another(tmp_path: Path) -> None:
    prints = [fingerprint([write(tmp_path / "a" / "modules")]), fingerprint([write(tmp_path / "b" / "modules", b"x = 2\n")])]
    moved = write(tmp_path / "c" / "modules")
    (moved / "scripts" / "a.py").rename(moved / "a.py")
    more = write(tmp_path / "d" / "modules")
    (more / "b.py").write_bytes(b"")
    prints += [fingerprint([moved]), fingerprint([more]), fingerprint([tmp_path / "nothing"])]
    assert len(set(prints)) == 5
    assert prints[-1] == ""


def test_a_worker_that_differs_is_refused_by_name_with_what_differs(tmp_path: Path) -> None:
    front = collect_versions(write(tmp_path / "p" / "modules").parent, tmp_path / "extensions", "1.2")
    assert find_differences(front, dict(front)) == []
    differences = find_differences(front, {**front, "torch": "1.0", "program": "1.1", "python": None})
    text = refusal("w1 on gpu-box", differences)
    assert "Worker w1 on gpu-box is refused" in text
    assert "version of this program 1.1 instead of 1.2" in text
    assert f"torch 1.0 instead of {front['torch']}" in text
    assert "Python None instead of" in text
    assert "Update that machine" in text


def test_builds_for_other_devices_are_the_same_version(tmp_path: Path) -> None:
    assert "+" not in collect_versions(tmp_path, tmp_path, "1")["torch"]
