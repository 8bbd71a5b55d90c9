from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modules.application import Application
from modules.errors import RequestError
from modules.pictures import images
from modules.pictures.metadata import read_info_from_image
from modules.settings.options import Options
from modules.settings.table import build_option_table
from tests.support.applications import installed_application

INFO = "a cat\nSteps: 20, Sampler: Euler a, Seed: 7, Size: 16x16"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def settings(**changes: Any) -> SimpleNamespace:
    """A processing object with its own settings."""
    return SimpleNamespace(options=Options(build_option_table({})).snapshot(changes))


def save(folder: Path, *, p: Any = None, **arguments: Any) -> Path:
    fields: dict[str, Any] = {"seed": 7, "prompt": "a cat", "info": INFO, "save_to_dirs": False, "p": p or settings(stealth_pnginfo_option="None")}
    return Path(images.save_image(PICTURE.copy(), folder, fields.pop("basename", ""), **fields | arguments)[0])


def read(path: Path) -> tuple[Image.Image, str | None]:
    with Image.open(path) as image:
        return image.copy(), read_info_from_image(image)[0]


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        yield app


def test_saved_png_holds_pixels_and_infotext(tmp_path: Path) -> None:
    image, info = read(save(tmp_path))
    assert np.array_equal(np.asarray(image), np.asarray(PICTURE))
    assert info == INFO


def test_default_names(tmp_path: Path) -> None:
    assert save(tmp_path).name == "00000-7-a cat.png"
    assert save(tmp_path).name == "00001-7-a cat.png"
    in_dirs = save(tmp_path, save_to_dirs=True)
    assert in_dirs.parent.name == datetime.datetime.now().strftime("%Y-%m-%d")
    assert in_dirs.name == "00000-7.png"
    assert Path(images.save_image(PICTURE, tmp_path / "g", "grid", 7, "a cat", short_filename=True, save_to_dirs=False)[0]).name == "grid-0000.png"
    assert save(tmp_path / "suffix", suffix="-before-hires").name == "00000-7-a cat-before-hires.png"


def test_settings_say_whether_pictures_and_grids_go_into_folders(tmp_path: Path) -> None:
    p = settings(save_to_dirs=True, grid_save_to_dirs=False, directories_filename_pattern="[seed]/[prompt_words]")
    assert save(tmp_path, p=p, save_to_dirs=None).parent == tmp_path / "7" / "a cat"
    assert save(tmp_path, p=p, save_to_dirs=None, grid=True).parent == tmp_path
    assert save(tmp_path, p=p, save_to_dirs=None, no_prompt=True).parent == tmp_path


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "avif"])
def test_every_kind_carries_its_infotext(tmp_path: Path, extension: str) -> None:
    path = save(tmp_path, extension=extension)
    assert path.suffix == f".{extension}"
    assert read(path)[1] == INFO


def test_pattern_of_the_settings(tmp_path: Path) -> None:
    p = settings(samples_filename_pattern="[seed]_[width]x[height]")
    p.all_seeds, p.batch_size = [7], 1
    assert save(tmp_path, p=p).name == "00000-7_16x16.png"


def test_numbers_continue_behind_the_highest(tmp_path: Path) -> None:
    for name in ("00041-1.png", "grid-0007.png", "99.txt", "no-number.png", ".00500.png.tmp"):
        (tmp_path / name).touch()
    assert images.get_next_sequence_number(tmp_path, "") == 100
    assert images.get_next_sequence_number(tmp_path, "grid") == 8
    assert images.get_next_sequence_number(tmp_path / "missing", "") == 0
    assert save(tmp_path).name == "00100-7-a cat.png"


def test_a_file_that_appears_meanwhile_keeps_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "get_next_sequence_number", lambda *_: 0)
    first = save(tmp_path)
    before = first.read_bytes()
    assert save(tmp_path).name == "00001-7-a cat.png"
    assert first.read_bytes() == before


def test_without_numbers_the_setting_decides_about_a_file_of_the_name(tmp_path: Path) -> None:
    numbered = settings(save_images_add_number=False, samples_filename_pattern="[seed]", save_images_replace_action="Add number suffix")
    assert [save(tmp_path, p=numbered).name for _ in range(3)] == ["7.png", "7-1.png", "7-2.png"]
    replacing = settings(save_images_add_number=False, samples_filename_pattern="[seed]", save_images_replace_action="Replace")
    assert save(tmp_path, p=replacing, info="another").name == "7.png"
    assert read(tmp_path / "7.png")[1] == "another"
    assert read(tmp_path / "7-1.png")[1] == INFO


def test_forced_name(tmp_path: Path) -> None:
    assert save(tmp_path, forced_filename="my picture").name == "my picture.png"
    assert save(tmp_path, forced_filename="../../../up").parent == tmp_path


@pytest.mark.parametrize("pattern", ["../../[seed]", "/etc/[seed]", "..\\..\\[seed]", "a/../../[seed]", "[prompt]"])
@pytest.mark.parametrize("add_number", [True, False])
def test_no_pattern_leads_out_of_the_folder(tmp_path: Path, pattern: str, add_number: bool) -> None:
    folder = tmp_path / "a" / "b"
    p = settings(samples_filename_pattern=pattern, directories_filename_pattern=pattern, save_images_add_number=add_number)
    for to_dirs in (True, False):
        saved = save(folder, p=p, save_to_dirs=to_dirs, prompt="../../../x").resolve()
        assert saved.is_relative_to(folder.resolve())
    assert set(tmp_path.iterdir()) == {tmp_path / "a"}


def test_a_long_prompt_in_any_script_makes_a_name_that_fits(tmp_path: Path) -> None:
    saved = save(tmp_path, prompt="漢字" * 200)
    assert len(saved.name.encode()) <= 255
    assert read(saved)[1] == INFO


def test_text_file(tmp_path: Path) -> None:
    path, text_path = images.save_image(PICTURE, tmp_path, "", 7, "a", info=INFO, p=settings(save_txt=True), save_to_dirs=False)
    assert text_path == str(Path(path).with_suffix(".txt"))
    assert Path(text_path).read_text(encoding="utf-8") == INFO + "\n"
    assert images.save_image(PICTURE, tmp_path, "", 7, "a", info=INFO, p=settings(), save_to_dirs=False)[1] is None


def test_a_text_file_that_cannot_be_written_does_not_undo_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    p = settings(save_txt=True)
    p.comment = said.append

    def has_no_room(*args: Any, **fields: Any) -> Path:
        raise images.ImageSaveError("cannot write a.txt: No space left on device.")

    monkeypatch.setattr(images, "write_whole", has_no_room)
    path, text_path = images.save_image(PICTURE, tmp_path, "", 7, "a", info=INFO, p=p, save_to_dirs=False)
    assert read(Path(path))[1] == INFO
    assert text_path is None
    assert said == ["Text file not saved: cannot write a.txt: No space left on device."]


def test_infotext_can_be_off_and_existing_chunks_stay(tmp_path: Path) -> None:
    assert read(save(tmp_path, p=settings(enable_pnginfo=False)))[1] is None
    saved = save(tmp_path, existing_info={"parameters": "old", "workflow": "w", "icc": b"bytes"}, pnginfo_section_name="extras")
    with Image.open(saved) as image:
        assert {key: image.info[key] for key in ("parameters", "workflow", "extras")} == {"parameters": "old", "workflow": "w", "extras": INFO}


@pytest.mark.parametrize(("mode", "saved_mode"), [("Alpha", "RGBA"), ("None", "RGB")])
def test_stealth_infotext_follows_the_setting(tmp_path: Path, mode: str, saved_mode: str) -> None:
    p = settings(stealth_pnginfo_option=mode)
    saved, _ = images.save_image(PICTURE.resize((64, 64)), tmp_path, "", 7, "a", info=INFO, p=p)
    image, _ = read(Path(saved))
    assert image.mode == saved_mode
    assert read_info_from_image(Image.fromarray(np.asarray(image)))[0] == (INFO if mode == "Alpha" else None)


def test_large_pictures_get_a_smaller_jpg_beside_them_if_wanted(tmp_path: Path) -> None:
    wanted = settings(export_for_4chan=True, target_side_length=8, stealth_pnginfo_option="None")
    saved = save(tmp_path, p=wanted)
    copy, info = read(saved.with_suffix(".jpg"))
    assert copy.size == (8, 8)
    assert info == INFO
    assert read(saved)[0].size == (16, 16)
    alone = save(tmp_path / "off", p=settings(export_for_4chan=False, target_side_length=8))
    assert list(alone.parent.iterdir()) == [alone]
    jpg = save(tmp_path / "jpg", p=wanted, extension="jpg")
    assert read(jpg)[0].size == (16, 16)
    assert list(jpg.parent.iterdir()) == [jpg]


def test_a_picture_too_long_for_its_kind_is_saved_as_png(tmp_path: Path) -> None:
    path, _ = images.save_image(Image.new("L", (17000, 4)), tmp_path, "grid", extension="webp", p=settings(export_for_4chan=False))
    assert path.endswith("grid-0000.png")
    assert read(Path(path))[0].size == (17000, 4)


def test_where_it_was_saved_is_on_the_picture(tmp_path: Path) -> None:
    image = PICTURE.copy()
    path, _ = images.save_image(image, tmp_path, "", 7, "a", p=settings())
    assert image.already_saved_as == path  # type: ignore[attr-defined]


def test_settings_of_the_application_count_without_a_request(app: Application, tmp_path: Path) -> None:
    app.options.set("samples_filename_pattern", "[prompt_no_styles]")
    app.styles.styles["Oil"] = type(app.styles.no_style)("Oil", "{prompt}, in oil", "")
    p = SimpleNamespace(styles=["Oil"])
    saved = images.save_image(PICTURE, tmp_path / "out", "", 7, "a cat, in oil", p=p, save_to_dirs=False)[0]
    assert Path(saved).name == "00000-a cat.png"


def test_save_image_with_geninfo_replaces_its_file(tmp_path: Path) -> None:
    target = tmp_path / "x.webp"
    target.write_bytes(b"old")
    images.save_image_with_geninfo(PICTURE, INFO, str(target))
    assert read(target)[1] == INFO


def test_resize_uses_the_upscaler_of_the_settings(app: Application) -> None:
    assert images.resize_image(1, PICTURE, 40, 24).size == (40, 24)
    nearest = images.resize_image(0, PICTURE, 32, 32, "Nearest")
    assert np.array_equal(np.asarray(nearest), np.asarray(PICTURE).repeat(2, 0).repeat(2, 1))
    app.options.set("upscaler_for_img2img", "Nearest")
    assert np.array_equal(np.asarray(images.resize_image(0, PICTURE, 32, 32)), np.asarray(nearest))
    assert images.resize_image(2, PICTURE, 24, 24, force_RGBA=True).mode == "RGBA"
    with pytest.raises(RequestError, match="no upscaler 'R-ESRGAN 4x'"):
        images.resize_image(0, PICTURE, 32, 32, "R-ESRGAN 4x")


def test_grid_follows_the_settings(app: Application) -> None:
    pictures = [PICTURE] * 6
    assert images.image_grid(pictures, batch_size=2).size == (48, 32)
    app.options.set("n_rows", 0)
    assert images.image_grid(pictures, batch_size=3).size == (32, 48)
    assert images.image_grid(pictures, rows=1).size == (96, 16)


def test_size_of_a_grid(app: Application) -> None:
    app.options.set("img_max_size_mp", 1)
    assert images.check_grid_size([Image.new("L", (500, 500))] * 4)
    assert not images.check_grid_size([Image.new("L", (500, 500))] * 5)


def test_annotations_and_prompt_matrix(app: Application) -> None:
    grid = images.image_grid([Image.new("RGB", (64, 64))] * 4, rows=2)
    columns, rows = [[images.GridAnnotation("a")], [images.GridAnnotation("b")]], [[images.GridAnnotation("c")]] * 2
    labelled = images.draw_grid_annotations(grid, 64, 64, columns, rows)
    assert labelled.width > grid.width
    assert labelled.height > grid.height
    assert images.draw_prompt_matrix(grid, 64, 64, ["a cat", "x", "y"]).size[0] > grid.width


def test_read_turns_a_picture_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "t.jpg", exif=exif)
    assert images.read(tmp_path / "t.jpg").size == (4, 8)
