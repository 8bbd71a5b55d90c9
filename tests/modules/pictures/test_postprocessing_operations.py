from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from modules.errors import RequestError
from modules.pictures.postprocessing_operations import AutoSizedCrop, Upscale, best_size_px, build_runner
from modules.scripts.postprocessing import PostprocessedImage

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))


def upscaled(operation: Upscale | None = None, **changes: Any) -> PostprocessedImage:
    values = {
        "upscale_enabled": True,
        "upscaler_1_name": "Nearest",
        "upscaler_2_name": "None",
        "upscaler_2_visibility": 0,
        "upscale_mode": 0,
        "upscale_by": 2,
        "max_side_length": 0,
        "upscale_to_width": 40,
        "upscale_to_height": 20,
        "upscale_crop": True,
        **changes,
    }
    pp = PostprocessedImage(PICTURE)
    operation = operation or Upscale()
    operation.process_firstpass(pp, **values)
    operation.process(pp, **values)
    return pp


def test_by_a_factor_and_what_is_said_of_it() -> None:
    pp = upscaled()
    assert np.array_equal(np.asarray(pp.image), np.asarray(PICTURE).repeat(2, 0).repeat(2, 1))
    assert pp.info == {"Postprocess upscale by": 2, "Postprocess upscaler": "Nearest"}
    assert (pp.shared.target_width, pp.shared.target_height) == (32, 24)


def test_to_a_size_with_and_without_cutting() -> None:
    assert upscaled(upscale_mode=1).image.size == (40, 20)
    assert upscaled(upscale_mode=1, upscale_crop=False).image.size == (40, 30)


def test_the_longer_side_can_be_limited() -> None:
    pp = upscaled(upscale_by=4, max_side_length=40)
    assert (pp.image.size, pp.info["Postprocess upscale by"]) == ((40, 30), 2.5)
    assert upscaled(upscale_by=2, max_side_length=400).image.size == (32, 24)


def test_two_upscalers_and_none() -> None:
    pp = upscaled(upscaler_2_name="Lanczos", upscaler_2_visibility=0.25)
    assert pp.info["Postprocess upscaler 2"] == "Lanczos"
    assert upscaled(upscale_enabled=False).info == {}
    assert upscaled(upscaler_1_name="None").image is PICTURE


def test_results_are_kept_until_the_picture_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    from modules.pictures import postprocessing_operations as module

    enlarge = module.enlarge
    monkeypatch.setattr(module, "enlarge", lambda *args: calls.append("x") or enlarge(*args))
    operation = Upscale(max_kept=2)
    for factor in (2, 3, 2):
        assert upscaled(operation, upscale_by=factor).image.width == 16 * factor
    assert len(calls) == 2
    upscaled(operation, upscale_by=1.5)
    upscaled(operation, upscale_by=3)
    assert len(calls) == 4
    operation.image_changed()
    upscaled(operation, upscale_by=3)
    assert len(calls) == 5


def test_mistakes_are_said() -> None:
    with pytest.raises(RequestError, match="no upscaler 'x'"):
        upscaled(upscaler_1_name="x")


@pytest.mark.parametrize(
    ("picture", "largest", "max_error", "expected"),
    [
        ((1000, 1000), True, 0.1, (640, 640)),
        ((1600, 900), False, 0.1, (576, 320)),
        ((1600, 900), True, 0.1, (768, 448)),
        ((3000, 100), True, 0.1, None),
    ],
)
def test_the_size_that_fits_best(picture: tuple[int, int], largest: bool, max_error: float, expected: tuple[int, int] | None) -> None:
    sides, areas = (256, 768), (64 * 64, 640 * 640)
    assert best_size_px(picture, sides_px=sides, areas_px=areas, largest=largest, max_error=max_error) == expected


def test_cutting_to_that_size() -> None:
    values = {"mindim": 64, "maxdim": 256, "minarea": 4096, "maxarea": 65536, "objective": "Maximize area", "threshold": 0.1}
    pp = PostprocessedImage(Image.new("RGB", (300, 100), "blue"))
    AutoSizedCrop().process(pp, enable=True, **values)
    assert pp.image.size == (192, 64)
    assert pp.info == {"Postprocess auto-sized crop": "192x64"}
    narrow = PostprocessedImage(Image.new("RGB", (300, 10)))
    AutoSizedCrop().process(narrow, enable=True, **values)
    assert (narrow.image.size, narrow.info) == ((300, 10), {"Postprocess auto-sized crop": "no size fits"})
    AutoSizedCrop().process(narrow, enable=False, **values)


def test_what_is_built_in_in_its_order() -> None:
    assert [script.name for script in build_runner().scripts_in_preferred_order()] == ["Upscale", "Auto-sized crop"]
