from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from modules.errors import RequestError
from modules.pictures.postprocessing import TO_SIZE, ExtrasSettings, goal_size_px, run_extras
from modules.pictures.upscaler import builtin_upscalers

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
UPSCALERS = builtin_upscalers()


def test_nothing_to_do_gives_the_very_picture() -> None:
    for settings in (ExtrasSettings(), ExtrasSettings(second="Lanczos")):
        result = run_extras(PICTURE, settings, UPSCALERS)
        assert result.image is PICTURE
        assert result.infotext == ""


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (ExtrasSettings(factor=1.5), (24, 18)),
        (ExtrasSettings(factor=0.01), (1, 1)),
        (ExtrasSettings(mode=TO_SIZE, size_px=(32, 32)), (43, 32)),
        (ExtrasSettings(mode=TO_SIZE, size_px=(64, 8)), (64, 48)),
    ],
)
def test_goal_size(settings: ExtrasSettings, size: tuple[int, int]) -> None:
    assert goal_size_px(PICTURE, settings) == size


def test_infotext_of_the_size_mode() -> None:
    result = run_extras(PICTURE, ExtrasSettings(mode=TO_SIZE, size_px=(32, 32), first="Nearest"), UPSCALERS)
    assert result.image.size == (32, 32)
    assert result.infotext == "Postprocess upscale to: 32x32, Postprocess crop to: 32x32, Postprocess upscaler: Nearest"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (ExtrasSettings(first="ESRGAN"), "no upscaler 'ESRGAN'"),
        (ExtrasSettings(first="Lanczos", second="x"), "no upscaler 'x'"),
        (ExtrasSettings(face_restoration_visibility=0.5), "face restoration"),
        (ExtrasSettings(first="Lanczos", factor=10_000), "the limit is"),
    ],
)
def test_mistakes(settings: ExtrasSettings, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        run_extras(PICTURE, settings, UPSCALERS)
