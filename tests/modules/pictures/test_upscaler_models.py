"""Model files with spandrel. The package is not in the test environment: a stand-in with its interface (ModelLoader, ImageModelDescriptor)
runs a torch network."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from modules.application import Application
from modules.errors import RequestError
from modules.pictures.upscaler import UpscalerData, UpscalerLanczos, builtin_upscalers, find_upscaler
from modules.pictures.upscaler_list import available_upscalers
from modules.pictures.upscaler_models import TileSettings, UpscalerModels, replace_entries, upscale_in_tiles
from tests.support.applications import installed_application


def smooth(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    bands = [127 + 100 * np.sin(x / 9), 127 + 100 * np.cos(y / 7), (x + y) * 255 / (width + height)]
    return Image.fromarray(np.stack(bands, axis=-1).round().astype(np.uint8))


def thrice(image: Image.Image) -> Image.Image:
    return image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST)


@pytest.mark.parametrize(("side_px", "overlap_px"), [(0, 0), (32, 8), (32, 40), (16, 0), (500, 8)])
def test_pieces_make_the_whole(side_px: int, overlap_px: int) -> None:
    image = smooth(70, 50)
    done = upscale_in_tiles(image, TileSettings(side_px=side_px, overlap_px=overlap_px), thrice)
    assert np.abs(np.asarray(done).astype(int) - np.asarray(thrice(image)).astype(int)).max() <= 1


def test_pieces_are_no_larger_than_asked_for() -> None:
    seen: list[tuple[int, int]] = []
    upscale_in_tiles(smooth(70, 50), TileSettings(side_px=32, overlap_px=8), lambda tile: seen.append(tile.size) or thrice(tile))
    assert set(seen) == {(32, 32)}


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        folder = app.config.models_dir / "ESRGAN"
        (folder / "sub").mkdir(parents=True)
        for name in ("4x-Sharp.pth", "sub/2x-Soft.safetensors", "readme.txt", "Lanczos.pth"):
            (folder / name).write_bytes(b"x")
        yield app


def test_files_are_in_the_list_that_everything_shares(app: Application) -> None:
    assert [entry.name for entry in available_upscalers()] == ["None", "Lanczos", "Nearest", "4x-Sharp", "2x-Soft"]
    assert isinstance(find_upscaler("Lanczos", available_upscalers()).scaler, UpscalerLanczos)
    (app.config.models_dir / "ESRGAN" / "4x-Sharp.pth").unlink()
    assert "4x-Sharp" not in [entry.name for entry in available_upscalers()]


def test_what_extensions_added_stays(tmp_path: Path) -> None:
    mine = UpscalerData("Mine", None)
    entries = [*builtin_upscalers(), mine]
    (tmp_path / "a.pth").touch()
    upscaler = UpscalerModels([tmp_path])
    replace_entries(entries, upscaler)
    assert [entry.name for entry in entries] == ["None", "Lanczos", "Nearest", "Mine", "a"]
    replace_entries(entries, None)
    assert entries[-1] is mine


def test_without_spandrel_the_reason_is_said(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    entry = find_upscaler("4x-Sharp", available_upscalers())
    with pytest.raises(RequestError, match="upscaler 4x-Sharp: running model files needs the package spandrel"):
        entry.scaler.upscale(smooth(16, 16), 2, entry.data_path)


class Descriptor:
    """What spandrel returns for an image model."""

    def __init__(self, scale: int = 4, input_channels: int = 3) -> None:
        self.scale, self.input_channels = scale, input_channels
        self.architecture = types.SimpleNamespace(name="ESRGAN")
        self.model: nn.Module = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Upsample(scale_factor=scale, mode="nearest"))
        with torch.no_grad():
            self.model[0].weight.copy_(torch.eye(3)[:, :, None, None])

    def __call__(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.model(x_BCHW)


@pytest.fixture
def spandrel(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("spandrel")
    module.ImageModelDescriptor = Descriptor
    module.UnsupportedModelError = type("UnsupportedModelError", (Exception,), {})
    module.loaded = []

    class ModelLoader:
        def load_from_file(self, path: str) -> Any:
            module.loaded.append(path)
            if isinstance(module.result, Exception):
                raise module.result
            return module.result

    module.ModelLoader, module.result = ModelLoader, Descriptor()
    monkeypatch.setitem(sys.modules, "spandrel", module)
    return module


def test_a_picture_goes_through_the_network(app: Application, spandrel: Any) -> None:
    app.options.ESRGAN_tile = 32
    entry = find_upscaler("4x-Sharp", available_upscalers())
    image = smooth(48, 40)
    larger = entry.scaler.upscale(image, 4, entry.data_path)
    expected = np.asarray(image).repeat(4, 0).repeat(4, 1).astype(int)
    assert np.abs(np.asarray(larger).astype(int) - expected).max() <= 1
    assert entry.scaler.upscale(image, 2, entry.data_path).size == (96, 80)
    assert len(spandrel.loaded) == 1


def test_files_that_are_no_upscalers(app: Application, spandrel: Any) -> None:
    entry = find_upscaler("4x-Sharp", available_upscalers())
    spandrel.result = spandrel.UnsupportedModelError("who knows")
    with pytest.raises(RequestError, match=r"cannot be read as an upscaler \(who knows\)"):
        entry.scaler.upscale(smooth(16, 16), 2, entry.data_path)
    spandrel.result = Descriptor(input_channels=4)
    with pytest.raises(RequestError, match="is not a model for upscaling"):
        entry.scaler.upscale(smooth(16, 16), 2, entry.data_path)
