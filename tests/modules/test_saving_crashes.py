"""Interrupted saves, and simultaneous saves from several processes: never half a file, never a replaced file."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from modules.pictures import images

ROOT = Path(images.__file__).parents[2]
PREAMBLE = """
    import errno, os, signal, sys
    from pathlib import Path
    from PIL import Image
    from modules.pictures import images
    from modules.pictures import writing as image_writing

    folder, how = Path(sys.argv[1]), sys.argv[2]

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def no_links(*_, **__):
        raise OSError(errno.EPERM, "operation not permitted")
"""
ONE_SAVE = """
    if how == "before it has its name":
        os.link = die
    elif how == "before the temporary name goes":
        path_unlink, Path.unlink = Path.unlink, die
    elif how == "without links, before it has its name":
        os.link, Path.replace = no_links, die
    elif how == "while it is flushed":
        os.fsync = die
    elif how == "before it takes the old one's place":
        Path.replace = die
        images.save_image_with_geninfo(Image.new("RGB", (64, 64), "blue"), "new", folder / "00000-1.png")
    images.save_image(Image.new("RGB", (64, 64), "red"), folder, "", 1, "a cat", info="Steps: 1, Sampler: Euler, Seed: 1", save_to_dirs=False)
"""
MANY_SAVES = """
    if how == "without links":
        os.link = no_links
    for number in range(8):
        path, _ = images.save_image(Image.new("RGB", (48, 48), (number, 0, 0)), folder, "", number, "a cat", info=how, save_to_dirs=False)
        print(path)
"""


def start(body: str, folder: Path, how: str) -> subprocess.Popen[str]:
    program = textwrap.dedent(PREAMBLE) + textwrap.dedent(body)
    return subprocess.Popen([sys.executable, "-c", program, str(folder), how], cwd=ROOT, stdout=subprocess.PIPE, text=True)


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
    process = start(ONE_SAVE, tmp_path, how)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
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
    processes = [start(MANY_SAVES, tmp_path, how) for _ in range(3)]
    written = [line for process in processes for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(written)) == 24
    assert shown_names(tmp_path) == sorted(Path(path).name for path in written)
    assert sorted(colour_of(Path(path))[0] for path in written) == sorted([*range(8)] * 3)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_name_that_a_dying_process_claimed_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "operation not permitted")

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
