"""Enlarging pictures: the base class of upscalers, and the two that need no model file, Lanczos and Nearest.

Names are those that extensions import. An upscaler takes and returns RGB pictures; must not know settings, the page or jobs.
pictures/upscaler_models.py runs model files.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from backend.model_folders import find_files
from modules.errors import RequestError
from modules.nearest_names import say_nearest

LANCZOS = Image.Resampling.LANCZOS
NEAREST = Image.Resampling.NEAREST

_SIDE_MULTIPLE_PX = 8
_MAX_PASSES = 3
"""Maximum: a model of factor 4 reaches 64 in three passes."""


class Upscaler:
    """Enlarges pictures with a model of fixed factor; `upscale` then resizes to the requested size."""

    name: str | None = None
    model_path: str | None = None
    model_name: str | None = None
    model_url: str | None = None
    enable = True
    filter = None
    model = None
    user_path: str | None = None
    scalers: list[UpscalerData]
    tile = True

    def __init__(self, create_dirs: bool = False) -> None:
        self.scalers = []
        self.mod_scale: int | None = None
        if self.model_path and create_dirs:
            Path(self.model_path).mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def do_upscale(self, img: Image.Image, selected_model: str | None) -> Image.Image:
        """`img` enlarged by the model's factor."""
        return img

    def upscale(self, img: Image.Image, scale: float, selected_model: str | None = None) -> Image.Image:
        """`img` enlarged by `scale`, each side rounded down to a multiple of 8 px."""
        goal_px = (_cut_side_px(img.width * scale), _cut_side_px(img.height * scale))
        for _ in range(_MAX_PASSES):
            if img.width >= goal_px[0] and img.height >= goal_px[1]:
                break
            size_before_px = img.size
            img = self.do_upscale(img, selected_model)
            if img.size == size_before_px:
                break
        return img if img.size == goal_px else img.resize(goal_px, resample=LANCZOS)

    @abstractmethod
    def load_model(self, path: str) -> object:
        """The network in the file `path`."""

    def find_models(self, ext_filter: Iterable[str] | None = None) -> list[str]:
        """Files in this upscaler's folders, filtered by suffix."""
        folders = [Path(folder) for folder in (self.model_path, self.user_path) if folder]
        suffixes = None if ext_filter is None else {suffix.lower() for suffix in ext_filter}
        return sorted(str(file) for folder in folders for file in find_files(folder, suffixes))

    def update_status(self, prompt: str) -> None:
        """Kept for extensions that call it."""


def _cut_side_px(side_px: float) -> int:
    return max(_SIDE_MULTIPLE_PX, int(side_px) // _SIDE_MULTIPLE_PX * _SIDE_MULTIPLE_PX)


class UpscalerData:
    """An entry of the upscaler list: a name, its model and the upscaler that runs it."""

    def __init__(
        self, name: str, path: str | None, upscaler: Upscaler | None = None, scale: float = 4, model: object = None, sha256: str | None = None
    ) -> None:
        self.name = name
        self.data_path = path
        self.local_data_path = path
        self.scaler = upscaler if upscaler is not None else UpscalerNone()
        self.scale = scale
        self.model = model
        self.sha256 = sha256

    def __repr__(self) -> str:
        return f"<UpscalerData name={self.name} path={self.data_path} scale={self.scale}>"


class UpscalerNone(Upscaler):
    """Returns the picture unchanged."""

    name = "None"

    def load_model(self, path: str) -> None:
        """There is no model."""

    def do_upscale(self, img: Image.Image, selected_model: str | None = None) -> Image.Image:
        return img

    def upscale(self, img: Image.Image, scale: float, selected_model: str | None = None) -> Image.Image:
        return img

    def __init__(self, dirname: object = None) -> None:
        super().__init__(False)
        self.scalers = [UpscalerData("None", None, self)]


class _Resampling(Upscaler):
    """An upscaler based on one of Pillow's resampling filters."""

    resample = LANCZOS

    def __init__(self, dirname: object = None) -> None:
        super().__init__(False)
        self.user_path = None if dirname is None else os.fspath(dirname)  # type: ignore[call-overload]
        self.scalers = [UpscalerData(str(self.name), None, self)]

    def load_model(self, path: str) -> None:
        """There is no model."""

    def do_upscale(self, img: Image.Image, selected_model: str | None = None) -> Image.Image:
        return img.resize((img.width * 4, img.height * 4), resample=self.resample)

    def upscale(self, img: Image.Image, scale: float, selected_model: str | None = None) -> Image.Image:
        """Resample directly to the final size, without an intermediate factor."""
        return img.resize((max(1, int(img.width * scale)), max(1, int(img.height * scale))), resample=self.resample)


class UpscalerLanczos(_Resampling):
    """Lanczos resampling."""

    name = "Lanczos"
    resample = LANCZOS


class UpscalerNearest(_Resampling):
    """Nearest-neighbor resampling: every pixel becomes a block."""

    name = "Nearest"
    resample = NEAREST


def builtin_upscalers() -> list[UpscalerData]:
    """The entries that always exist, in list order."""
    return [entry for upscaler in (UpscalerNone(), UpscalerLanczos(), UpscalerNearest()) for entry in upscaler.scalers]


def find_upscaler(name: str | None, entries: Iterable[UpscalerData]) -> UpscalerData:
    """The entry with that name or file name, ignoring case. Raises RequestError with the nearest names."""
    asked = (name or "None").strip()
    entries = list(entries)
    file_name = asked.replace("\\", "/").rpartition("/")[2].lower()
    for wanted, of in ((asked.lower(), lambda entry: entry.name), (file_name, lambda entry: Path(entry.data_path or "").name)):
        for entry in entries:
            if of(entry).lower() == wanted:
                return entry
    raise RequestError(f"there is no upscaler {asked[:200]!r}; {say_nearest(asked, [entry.name for entry in entries])}.")
