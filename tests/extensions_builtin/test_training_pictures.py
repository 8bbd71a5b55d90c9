"""The operations of Extras for training pictures: crops around what is interesting, parts of long pictures, mirrored copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from modules.scripts.postprocessing import Operation, PostprocessedImage, PostprocessedImageSharedInfo, run_operations
from tests.support.extensions import import_builtin

FOLDER = "training_pictures"


def crops() -> Any:
    return import_builtin(FOLDER, "picture_crops")


def with_detail_at(x: int, y: int, size: tuple[int, int] = (300, 100)) -> Image.Image:
    """A gray picture with a small checkered patch around one place."""
    image = Image.new("RGB", size, (128, 128, 128))
    draw = ImageDraw.Draw(image)
    for row in range(-3, 3):
        for column in range(-3, 3):
            shade = 40 * ((row + column) % 5) + 20
            draw.rectangle((x + column * 6, y + row * 6, x + column * 6 + 5, y + row * 6 + 5), fill=(shade, shade, shade))
    return image


def run_one(script: Any, image: Image.Image, target: tuple[int, int] | None, **values: Any) -> PostprocessedImage:
    pp = PostprocessedImage(image)
    pp.shared = PostprocessedImageSharedInfo(*target) if target else PostprocessedImageSharedInfo()
    run_operations(pp, [Operation(script=script, values=values)])
    return pp


@pytest.mark.parametrize("weights", [{"face": 0.0, "entropy": 0.0, "edges": 1.0}, {"face": 0.0, "entropy": 1.0, "edges": 0.0}])
@pytest.mark.parametrize("x", [40, 250])
def test_the_crop_holds_what_stands_out(weights: dict[str, float], x: int) -> None:
    cut, marked = crops().crop_around_focus(with_detail_at(x, 50), (100, 100), marks=True, **weights)
    assert cut.size == (100, 100) and marked is not None and marked.size == (300, 100)
    spread = np.asarray(cut.convert("L"), dtype=float).std()
    middle = np.asarray(with_detail_at(x, 50).crop((100, 0, 200, 100)).convert("L"), dtype=float).std()
    assert spread > 10 > middle


def test_corners_and_entropy_are_found_where_they_are() -> None:
    module = crops()
    square = np.zeros((60, 80))
    square[20:40, 30:60] = 255
    corners = module.find_corners(square)
    assert len(corners) >= 4 and all(min(abs(x - 30), abs(x - 59)) <= 3 and min(abs(y - 20), abs(y - 39)) <= 3 for x, y in corners)
    assert module.entropy_of(np.zeros((4, 4))) == 0.0
    assert module.entropy_of(np.repeat([0.0, 100.0, 200.0, 250.0], 4)) == pytest.approx(2.0)
    assert module.find_corners(np.zeros((30, 30))) == []
    assert module.focal_point([], (30, 20)) == (15, 10)
    points = [module.Point(0, 0, 1.0), module.Point(30, 10, 2.0)]
    assert module.focal_point(points, (1, 1)) == pytest.approx((20, 20 / 3))


@pytest.mark.parametrize(
    ("size", "target", "overlap", "count"),
    [((400, 100), (100, 100), 0.2, 5), ((400, 100), (100, 100), 0.0, 4), ((100, 350), (50, 50), 0.0, 4), ((150, 100), (100, 100), 0.2, 1)],
)
def test_a_long_picture_becomes_parts_that_overlap(size: tuple[int, int], target: tuple[int, int], overlap: float, count: int) -> None:
    gradient = Image.fromarray(np.tile(np.linspace(0, 255, size[0]), (size[1], 1)).astype(np.uint8))
    parts = crops().split_picture(gradient, target, threshold=0.5, overlap=overlap)
    assert len(parts) == count
    assert {part.size for part in parts} == ({target} if count > 1 else {size})
    if size[0] > size[1] and count > 1:
        assert np.asarray(parts[0])[0, 0] <= 2 and np.asarray(parts[-1])[0, -1] >= 253, "both ends are there"


def test_the_operations_have_a1111s_names_and_do_nothing_without_being_asked() -> None:
    focal = import_builtin(f"{FOLDER}/scripts", "postprocessing_focal_crop")
    split = import_builtin(f"{FOLDER}/scripts", "postprocessing_split_oversized")
    flip = import_builtin(f"{FOLDER}/scripts", "postprocessing_create_flipped_copies")
    scripts = (focal.ScriptPostprocessingFocalCrop(), split.ScriptPostprocessingSplitOversized(), flip.ScriptPostprocessingCreateFlippedCopies())
    assert [(script.name, script.order) for script in scripts] == [
        *(("Auto focal point crop", 4010), ("Split oversized images", 4000), ("Create flipped copies", 4030)),
    ]
    picture = with_detail_at(40, 50)
    for script in scripts:
        assert run_one(script, picture, (50, 50), enable=False).image is picture
    weights = {"face_weight": 0.9, "entropy_weight": 0.15, "edges_weight": 0.5}
    assert run_one(scripts[0], picture, None, enable=True, debug=False, **weights).image is picture, "no size to crop to"
    cut = run_one(scripts[0], picture, (50, 50), enable=True, debug=True, **weights)
    assert cut.image.size == (50, 50) and [extra.nametags for extra in cut.extra_images] == [["focal-crop-debug"]]
    assert cut.info["Auto focal point crop"] == "50x50"
    parts = run_one(scripts[1], picture, (50, 50), enable=True, split_threshold=0.5, overlap_ratio=0.2)
    assert {one.image.size for one in (parts, *parts.extra_images)} == {(50, 50)} and parts.info["Split oversized images"] == 4
    copies = run_one(scripts[2], picture, None, enable=True, option=["Horizontal", "Both"])
    assert copies.image is picture
    assert [extra.image.tobytes() for extra in copies.extra_images] == [
        ImageOps.mirror(picture).tobytes(), ImageOps.flip(ImageOps.mirror(picture)).tobytes(),
    ]  # fmt: skip
