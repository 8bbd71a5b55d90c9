"""Downloading and finding model files, under the names that extensions import."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlparse

from backend.model_folders import find_files
from modules.pictures.upscaler_list import available_upscalers

log = logging.getLogger(__name__)


def load_file_from_url(
    url: str, *, model_dir: str, progress: bool = True, file_name: str | None = None, hash_prefix: str | None = None, re_download: bool = False
) -> str:
    """The absolute path of the file from `url` in `model_dir`, downloaded if missing. The download is atomic.

    `hash_prefix`: required start of its SHA-256. Raises URLError, and RuntimeError if the hash differs.
    """
    import torch  # heavy; only needed for downloads

    folder = Path(model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    target = (folder / (file_name or Path(unquote(urlparse(url).path)).name)).absolute()
    if re_download or not target.is_file():
        log.info("Downloading %s to %s.", url, target)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=hash_prefix, progress=progress)
    return str(target)


def load_models(
    model_path: str,
    model_url: str | None = None,
    command_path: str | None = None,
    ext_filter: Sequence[str] | None = None,
    download_name: str | None = None,
    ext_blacklist: Sequence[str] | None = None,
    hash_prefix: str | None = None,
) -> list[str]:
    """Model files below `command_path` and `model_path`; if there are none and a URL is given, the file from there."""
    folders = [Path(folder) for folder in (command_path, model_path) if folder]
    found = [path for folder in folders for path in find_files(folder)]
    wanted = [
        str(path) for path in found if (not ext_filter or path.suffix.lower() in ext_filter) and not path.name.endswith(tuple(ext_blacklist or ()))
    ]
    if wanted or model_url is None:
        return list(dict.fromkeys(wanted))
    return [load_file_from_url(model_url, model_dir=model_path, file_name=download_name, hash_prefix=hash_prefix)]


def load_upscalers() -> None:
    """Look at the folders of upscaler files again; `shared.sd_upscalers` has what is there."""
    available_upscalers()


def friendly_name(file: str) -> str:
    """A file name without its suffix, for lists."""
    return Path(urlparse(file).path if "http" in file else file).stem
