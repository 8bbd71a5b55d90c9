from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from PIL import Image

from modules.pictures import writing
from modules.pictures.metadata import read_info_from_image
from modules.pictures.writing import (
    EncodeSettings,
    ImageSaveError,
    PictureText,
    encode_image,
    known_extensions,
    numbered_names,
    write_image,
    write_whole,
)

INFOTEXT = "a cat, ü 漢字\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, Seed: 1, Size: 64x64"
TEXT = PictureText(infotext=INFOTEXT)


def picture(mode: str = "RGB") -> Image.Image:
    ramp = np.linspace(0, 255, 64 * 48 * 3, dtype=np.uint8).reshape(48, 64, 3)
    return Image.fromarray(ramp).convert(mode)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


def encoded(image: Image.Image, extension: str, settings: EncodeSettings | None = None, text: PictureText = TEXT) -> Image.Image:
    buffer = io.BytesIO()
    encode_image(image, buffer, extension, text, settings or EncodeSettings())
    buffer.seek(0)
    return Image.open(buffer)


@pytest.mark.parametrize("extension", known_extensions())
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "I;16", "I", "F", "CMYK", "1"])
def test_every_mode_goes_into_every_kind_with_its_infotext(extension: str, mode: str) -> None:
    image = picture("I").convert("I;16") if mode == "I;16" else picture(mode)
    read_back = encoded(image, extension)
    assert read_back.size == (64, 48)
    assert read_info_from_image(read_back)[0] == INFOTEXT


def test_png_keeps_every_pixel_and_the_other_chunks() -> None:
    text = PictureText(infotext=INFOTEXT, section="extras", chunks={"parameters": "old", "bad\0key": "x\0y"})
    read_back = encoded(picture(), "png", text=text)
    assert np.array_equal(np.asarray(read_back), np.asarray(picture()))
    assert read_back.info["extras"] == INFOTEXT
    assert read_back.info["parameters"] == "old"
    assert read_back.info["badkey"] == "xy"


def test_lossless_webp_keeps_every_pixel() -> None:
    assert np.array_equal(np.asarray(encoded(picture(), "webp", EncodeSettings(webp_lossless=True))), np.asarray(picture()))


def test_quality_changes_the_size_of_a_jpeg() -> None:
    def length(quality: int) -> int:
        buffer = io.BytesIO()
        encode_image(picture(), buffer, "jpg", TEXT, EncodeSettings(quality=quality))
        return buffer.tell()

    assert length(10) < length(95)


@pytest.mark.parametrize("extension", known_extensions())
def test_infotext_can_be_left_out(extension: str) -> None:
    read_back = encoded(picture(), extension, EncodeSettings(write_infotext=False, stealth_mode="Alpha"))
    assert read_info_from_image(read_back)[0] is None
    assert read_back.mode in ("RGB", "P")


def test_stealth_infotext_outlives_the_chunk() -> None:
    read_back = encoded(picture(), "png", EncodeSettings(stealth_mode="Alpha"))
    stripped = Image.fromarray(np.asarray(read_back))
    assert read_info_from_image(stripped)[0] == INFOTEXT


def test_unknown_kinds_and_sides_a_kind_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageSaveError, match="choose one of png"):
        encode_image(picture(), io.BytesIO(), "xyz", TEXT, EncodeSettings())
    with pytest.raises(ImageSaveError, match="too large for"):
        write_image(Image.new("L", (17000, 1)), [tmp_path / "wide.webp"], TEXT, EncodeSettings())
    assert list(tmp_path.iterdir()) == []


def test_takes_the_first_free_name_and_never_anothers_place(tmp_path: Path) -> None:
    names = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"]
    names[0].write_bytes(b"mine")
    names[1].write_bytes(b"mine too")
    assert write_image(picture(), names, TEXT, EncodeSettings()) == names[2]
    assert names[0].read_bytes() == b"mine"
    assert names[1].read_bytes() == b"mine too"
    with pytest.raises(ImageSaveError, match="all names tried are taken"):
        write_image(picture(), names, TEXT, EncodeSettings())


def test_replaces_only_when_told(tmp_path: Path) -> None:
    name = tmp_path / "a.png"
    name.write_bytes(b"old")
    assert write_image(picture(), numbered_names(name), TEXT, EncodeSettings()) == tmp_path / "a-1.png"
    assert write_image(picture(), numbered_names(name), TEXT, EncodeSettings(), replace=True) == name
    assert size_of(name) == (64, 48)


def test_a_name_taken_between_looking_and_writing_is_not_overwritten(tmp_path: Path) -> None:
    first, second = tmp_path / "00000.png", tmp_path / "00001.png"

    def write(file: BinaryIO) -> None:
        first.write_bytes(b"another program was faster")
        file.write(b"ours")

    assert write_whole(write, [first, second]) == second
    assert first.read_bytes() == b"another program was faster"


def test_many_writers_each_get_a_name_of_their_own(tmp_path: Path) -> None:
    written: list[Path] = []
    threads = [
        threading.Thread(target=lambda: written.append(write_image(picture(), numbered_names(tmp_path / "x.png"), TEXT, EncodeSettings())))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(written)) == 12
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "a.png").write_bytes(b"mine")
    assert write_image(picture(), [tmp_path / "a.png", tmp_path / "b.png"], TEXT, EncodeSettings()) == tmp_path / "b.png"
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    assert size_of(tmp_path / "b.png") == (64, 48)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"half a picture")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ImageSaveError, match=r"No space left on device\. Free disk space"):
        write_whole(write, [tmp_path / "a.png"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ImageSaveError, match="cannot write"):
        write_image(picture(), [tmp_path / "file" / "a.png"], TEXT, EncodeSettings())


@pytest.mark.parametrize("replace", [False, True])
def test_a_process_killed_in_the_middle_of_a_save_leaves_no_half_file_and_the_old_one_whole(tmp_path: Path, replace: bool) -> None:
    old = tmp_path / "00000.png"
    old.write_bytes(b"the old picture")
    program = f"""
        import os, signal, sys
        from pathlib import Path
        from modules.pictures.writing import write_whole

        def write(file):
            file.write(b"half a picture")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        write_whole(write, [Path({str(old)!r}), Path({str(tmp_path / "00001.png")!r})], replace={replace})
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=Path(writing.__file__).parents[2], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert old.read_bytes() == b"the old picture"
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["00000.png"]


def test_new_files_have_the_usual_permissions(tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    reference.write_bytes(b"")
    written = write_image(picture(), [tmp_path / "a.png"], TEXT, EncodeSettings())
    assert written.stat().st_mode == reference.stat().st_mode
