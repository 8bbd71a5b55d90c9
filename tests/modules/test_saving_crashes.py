"""Interrupted saves, and simultaneous saves from several processes: never half a file, never a replaced file."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modules.pictures import images

NUM_SAVES = 8
fork_server: Any = multiprocessing.get_context("forkserver" if os.name != "nt" else "spawn")
"""Every save has a process of its own, forked from one that has imported this module."""
if os.name != "nt":
    fork_server.set_forkserver_preload([__name__])


def no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "operation not permitted")


def save_and_die(folder: Path, how: str) -> None:
    """Save a red picture, and kill this process at the moment that `how` names."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    changed: Any = {
        "before it has its name": ((os, "link", die),),
        "before the temporary name goes": ((Path, "unlink", die),),
        "without links, before it has its name": ((os, "link", no_links), (Path, "replace", die)),
        "while it is flushed": ((os, "fsync", die),),
        "before it takes the old one's place": ((Path, "replace", die),),
    }[how]
    for owner, name, function in changed:
        setattr(owner, name, function)
    if how == "before it takes the old one's place":
        images.save_image_with_geninfo(Image.new("RGB", (64, 64), "blue"), "new", str(folder / "00000-1.png"))
    images.save_image(Image.new("RGB", (64, 64), "red"), folder, "", 1, "a cat", info="Steps: 1, Sampler: Euler, Seed: 1", save_to_dirs=False)


def save_many(folder: Path, how: str, written: Any) -> None:
    if how == "without links":
        os.link = no_links
    for number in range(NUM_SAVES):
        path, _ = images.save_image(Image.new("RGB", (48, 48), (number, 0, 0)), folder, "", number, "a cat", info=how, save_to_dirs=False)
        written.put(str(path))


def shown_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def colour_of(path: Path) -> tuple[int, ...]:
    with Image.open(path) as image:
        image.load()
        return tuple(image.convert("RGB").getpixel((1, 1)))  # type: ignore[arg-type]


def save(folder: Path, colour: str) -> Path:
    return Path(images.save_image(Image.new("RGB", (64, 64), colour), folder, "", 1, "a cat", info="text", save_to_dirs=False)[0])


@pytest.mark.skipif(os.name == "nt", reason="kills its process by a signal")
@pytest.mark.parametrize(
    ("how", "is_saved"),
    [
        ("while it is flushed", False),
        ("before it has its name", False),
        ("before the temporary name goes", True),
        ("without links, before it has its name", False),
        ("before it takes the old one's place", False),
    ],
)
def test_a_killed_save_leaves_a_whole_picture_or_none(tmp_path: Path, how: str, is_saved: bool) -> None:
    """The folder has an older picture; after the kill it is intact, and the next save replaces neither it nor a finished one."""
    older = save(tmp_path, "green")
    process = fork_server.Process(target=save_and_die, args=(tmp_path, how))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    names = shown_names(tmp_path)
    assert len(names) == 1 + is_saved
    assert colour_of(older) == (0, 128, 0)
    assert all(colour_of(tmp_path / name) == (255, 0, 0) for name in names if name != older.name)
    following = save(tmp_path, "blue")
    assert following.name not in names
    assert colour_of(following) == (0, 0, 255)
    assert [colour_of(tmp_path / name) for name in names] == [(0, 128, 0), (255, 0, 0)][: len(names)]


@pytest.mark.parametrize("how", ["with links", "without links"])
def test_processes_that_save_at_once_never_take_one_name(tmp_path: Path, how: str) -> None:
    queue = fork_server.SimpleQueue()
    processes = [fork_server.Process(target=save_many, args=(tmp_path, how, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    written = [queue.get() for _ in range(3 * NUM_SAVES)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(set(written)) == 3 * NUM_SAVES
    assert shown_names(tmp_path) == sorted(Path(path).name for path in written)
    assert sorted(colour_of(Path(path))[0] for path in written) == sorted([*range(NUM_SAVES)] * 3)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_name_that_a_dying_process_claimed_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as inner:
        inner.setattr(Path, "replace", fail)
        inner.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, "red")
    assert shown_names(tmp_path) == []
    assert save(tmp_path, "blue").name.startswith("00001")
