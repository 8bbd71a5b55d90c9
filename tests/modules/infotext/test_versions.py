from __future__ import annotations

import pytest

from modules.infotext.parameters import parse_generation_parameters
from modules.infotext.versions import backcompat, parse_version


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("v1.6.0", (1, 6, 0, 0)),
        ("v1.7.0-133-gde03882d", (1, 7, 0, 133)),
        ("f2.0.1v1.10.1-previous-313-g8a042934", (1, 10, 1, 0)),
        ("f0.0.17v1.8.0rc-latest-276-g29be1da7", (1, 8, 0, 0)),
        ("1.6.0-RC", None),
        ("ComfyUI", None),
        ("", None),
        (None, None),
    ],
)
def test_versions(text: str | None, version: tuple[int, ...] | None) -> None:
    assert parse_version(text) == version


def test_old_pictures_get_the_old_meaning() -> None:
    params = {"Version": "v1.5.1", "Prompt": "[a:b:0.5]", "Sampler": "DDIM", "Refiner": "sd_xl_refiner"}
    backcompat(params)
    assert params["Old prompt editing timelines"] == "True"
    assert params["Pad conds v0"] == "True"
    assert params["Downcast alphas_cumprod"] == "True"
    assert params["Refiner switch by sampling steps"] == "True"


@pytest.mark.parametrize("version", ["v1.10.1", "f2.0.1v1.10.1-previous-313", "ComfyUI", None])
def test_new_and_unknown_versions_change_nothing(version: str | None) -> None:
    params = {"Prompt": "[a:b:0.5]", "Sampler": "DDIM", "Refiner": "x"} | ({"Version": version} if version else {})
    before = dict(params)
    backcompat(params)
    assert params == before


def test_numbers_of_thousands_of_digits_are_no_version() -> None:
    assert parse_version(f"v{'1' * 5000}.2.3") is None


def test_sizes_of_thousands_of_digits_are_read_without_an_error() -> None:
    digits = "9" * 4000
    params = parse_generation_parameters(f"a\nSteps: 1, Sampler: Euler, Size: {digits}x{digits}, First pass size: 0x0, Version: v{digits}.1.1")
    assert params["Steps"] == "1"
