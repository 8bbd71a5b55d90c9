"""Upscalers from model files (ESRGAN, Real-ESRGAN, SwinIR, DAT ...), run with the package spandrel if it can be imported.

spandrel is not part of the installation: it requires torchvision, which would bring its own torch. Files are listed anyway, and using
one explains what is missing. Must not know settings, the page or jobs; it gets what it needs as arguments.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from backend.model_folders import find_files
from modules.errors import RequestError
from modules.pictures.grids import Grid, combine_grid, split_grid
from modules.pictures.upscaler import Upscaler, UpscalerData

if TYPE_CHECKING:
    from torch import Tensor

    from backend.patcher.base import ModelPatcher

log = logging.getLogger(__name__)

SUFFIXES = (".pth", ".pt", ".safetensors", ".ckpt")
FOLDER_FLAGS = ("esrgan_models_path", "realesrgan_models_path", "bsrgan_models_path", "dat_models_path", "swinir_models_path", "scunet_models_path")
"""Configuration keys of the folders with such files, in list order."""
ASSUMED_SCALE = 4
"""Assumed until the file is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileSettings:
    """Side and overlap of the tiles in which a picture is enlarged; side 0 means the whole picture at once."""

    side_px: int = 192
    overlap_px: int = 8


class UpscalerModels(Upscaler):
    """Runs the files in `folders`. Keeps the last used network."""

    name = "Model file"
    model_name = "spandrel"

    def __init__(self, folders: Sequence[Path], tiles: Callable[[], TileSettings] = TileSettings) -> None:
        super().__init__(False)
        self.folders = tuple(folders)
        self._tiles = tiles
        self._used: tuple[str, Any, ModelPatcher] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Scan the folders again. Of two files with the same name, the first wins."""
        known = {entry.data_path: entry for entry in self.scalers}
        paths = {path.stem: str(path) for folder in reversed(self.folders) for path in reversed(find_files(folder, SUFFIXES))}
        self.scalers = [known.get(path) or UpscalerData(stem, path, self, ASSUMED_SCALE) for stem, path in reversed(paths.items())]

    def do_upscale(self, img: Image.Image, selected_model: str | None) -> Image.Image:
        """Raises RequestError if the file cannot be run."""
        descriptor, patcher = self.load_model(str(selected_model))
        return upscale_in_tiles(img, self._tiles(), lambda tile: _run(descriptor, patcher, tile))

    def load_model(self, path: str) -> tuple[Any, ModelPatcher]:
        """(spandrel's descriptor, the patcher of its network). Raises RequestError."""
        if self._used is None or self._used[0] != path:
            self._used = (path, *_read(Path(path)))
        entry = next((entry for entry in self.scalers if entry.data_path == path), None)
        if entry is not None:
            entry.scale = self._used[1].scale
        return self._used[1], self._used[2]


def upscale_in_tiles(image: Image.Image, tiles: TileSettings, run: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`run` on overlapping tiles of `image`, combined. `run` must enlarge every tile by the same whole factor."""
    if tiles.side_px <= 0 or max(image.size) <= tiles.side_px:
        return run(image)
    grid = split_grid(image, tiles.side_px, tiles.side_px, min(tiles.overlap_px, tiles.side_px // 2))
    scale = 1
    rows = []
    for top, height, row in grid.tiles:
        done = []
        for left, width, tile in row:
            larger = run(tile)
            scale = larger.width // tile.width
            done.append([left * scale, width * scale, larger])
        rows.append([top * scale, height * scale, done])
    sizes = (grid.tile_w, grid.tile_h, grid.image_w, grid.image_h, grid.overlap)
    return combine_grid(Grid(rows, *(size * scale for size in sizes)))


def _read(path: Path) -> tuple[Any, ModelPatcher]:
    try:
        import spandrel  # optional; heavy
    except ImportError as error:
        raise RequestError(
            f"upscaler {path.stem}: running model files needs the package spandrel, which cannot be imported ({error}). "
            "Install it into this program's environment with a torchvision that matches its torch, or choose Lanczos or Nearest."
        ) from error
    from backend import memory_management  # imports torch
    from backend.patcher.base import ModelPatcher

    try:
        descriptor = spandrel.ModelLoader().load_from_file(str(path))
    except (OSError, RuntimeError, ValueError, KeyError, spandrel.UnsupportedModelError) as error:
        raise RequestError(f"upscaler {path.stem}: {path} cannot be read as an upscaler ({error}). Download it again, or choose another.") from error
    if not isinstance(descriptor, spandrel.ImageModelDescriptor) or descriptor.input_channels != 3:
        raise RequestError(f"upscaler {path.stem}: {path.name} is not a model for upscaling color pictures.")
    descriptor.model.eval()
    patcher = ModelPatcher(descriptor.model, memory_management.get_torch_device(), memory_management.cpu)
    log.info("Upscaler %s: %s, factor %d.", path.stem, descriptor.architecture.name, descriptor.scale)
    return descriptor, patcher


def _run(descriptor: Any, patcher: ModelPatcher, image: Image.Image) -> Image.Image:
    import torch  # heavy; not needed to list upscalers

    from backend import memory_management

    def enlarge() -> Tensor:
        memory_management.load_model_gpu(patcher)
        with torch.no_grad():
            larger_BCHW: Tensor = descriptor(pixels_BCHW.to(patcher.load_device))
        return larger_BCHW

    pixels_BCHW = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).movedim(-1, 0)[None]
    larger_BCHW = memory_management.run_with_recovery(enlarge, what="enlarging a picture", device=patcher.load_device, keep=[patcher])
    values_HWC = larger_BCHW[0].float().clamp(0, 1).mul(255).round().to(torch.uint8).movedim(0, -1)
    return Image.fromarray(values_HWC.cpu().numpy())


def replace_entries(entries: list[UpscalerData], upscaler: UpscalerModels | None) -> None:
    """Sync the shared list with the folders: model files last, all other entries unchanged."""
    if upscaler is not None:
        upscaler.refresh()
    others = [entry for entry in entries if not isinstance(entry.scaler, UpscalerModels)]
    taken = {entry.name.lower() for entry in others}
    files = [] if upscaler is None else upscaler.scalers
    entries[:] = [*others, *(entry for entry in files if entry.name.lower() not in taken)]


def build_upscaler_models(flags: Mapping[str, Any], options: Any) -> UpscalerModels:
    """For an application: folders from its flags, tile settings read at the time of upscaling."""
    folders = [Path(flags[flag]) for flag in FOLDER_FLAGS if flags.get(flag)]
    return UpscalerModels(folders, lambda: TileSettings(side_px=int(options.ESRGAN_tile), overlap_px=int(options.ESRGAN_tile_overlap)))
