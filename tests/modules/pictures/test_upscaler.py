from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modules.errors import RequestError
from modules.pictures.upscaler import LANCZOS, Upscaler, UpscalerData, builtin_upscalers, find_upscaler


class Doubler(Upscaler):
    name = "Doubler"

    def do_upscale(self, img: Image.Image, selected_model: str | None) -> Image.Image:
        return img.resize((img.width * 2, img.height * 2), Image.Resampling.NEAREST)


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))


def test_builtin_list() -> None:
    assert [entry.name for entry in builtin_upscalers()] == ["None", "Lanczos", "Nearest"]


def test_lanczos_nearest_and_none() -> None:
    entries = builtin_upscalers()
    assert find_upscaler(None, entries).scaler.upscale(noise(), 4) is not None
    assert find_upscaler("None", entries).scaler.upscale(noise(), 4).size == (32, 24)
    lanczos = find_upscaler("lanczos", entries).scaler.upscale(noise(), 1.5)
    assert np.array_equal(np.asarray(lanczos), np.asarray(noise().resize((48, 36), LANCZOS)))
    nearest = find_upscaler("Nearest", entries).scaler.upscale(noise(), 3)
    assert np.array_equal(np.asarray(nearest), np.asarray(noise()).repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize(("scale", "size"), [(2, (64, 48)), (4, (128, 96)), (3.1, (96, 72)), (1, (32, 24)), (100, (256, 192))])
def test_a_models_factor_is_brought_to_the_size_asked_for(scale: float, size: tuple[int, int]) -> None:
    goal = size if scale < 100 else (3200, 2400)
    assert Doubler().upscale(noise(), scale).size == goal


def test_an_upscaler_that_does_not_enlarge_still_ends() -> None:
    class Lazy(Upscaler):
        def do_upscale(self, img: Image.Image, selected_model: str | None) -> Image.Image:
            return img

    assert Lazy().upscale(noise(), 2).size == (64, 48)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"no upscaler '4x-Ultra'; there are: None, Lanczos, Nearest"):
        find_upscaler("4x-Ultra", builtin_upscalers())


def test_entries_of_extensions() -> None:
    entry = UpscalerData("Mine", "model.pth", Doubler(), 2)
    assert find_upscaler("mine", [*builtin_upscalers(), entry]) is entry
    assert UpscalerData("Plain", None).scaler.name == "None"


def test_find_models(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.pth", "sub/b.SAFETENSORS", "c.txt"):
        (tmp_path / name).touch()
    upscaler = Doubler()
    upscaler.model_path = str(tmp_path)
    assert upscaler.find_models([".pth", ".safetensors"]) == [str(tmp_path / "a.pth"), str(tmp_path / "sub" / "b.SAFETENSORS")]
