"""Small copies of pictures, kept in the cache folder. Must not know the table."""

from __future__ import annotations

import hashlib
import io
import threading
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from backend.unfinished_files import replace_content
from modules.pictures.unreadable import UNREADABLE

SIDE_PX = 256
MAX_KEPT = 20_000
CHECK_EVERY = 500
AT_ONCE = 2
MAX_PIXELS = 100_000_000


class Thumbnails:
    """Copies in `folder`, named by path and time of their pictures. The oldest are deleted when there are more than MAX_KEPT."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._turns = threading.BoundedSemaphore(AT_ONCE)
        self._num_written = 0

    def of(self, picture: Path) -> Path | None:
        """The copy of `picture`; None for a file that cannot be read as one."""
        try:
            mtime_ns = picture.stat().st_mtime_ns
        except OSError:
            return None
        name = hashlib.sha256(f"{picture}\0{mtime_ns}".encode("utf-8", "surrogateescape")).hexdigest()[:40]
        file = self.folder / name[:2] / f"{name}.webp"
        if file.is_file():
            return file
        with self._turns:
            return file if file.is_file() or self._write(picture, file) else None

    def _write(self, picture: Path, file: Path) -> bool:
        content = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with Image.open(picture) as image:
                    if image.width * image.height > MAX_PIXELS:
                        return False
                    image.draft("RGB", (SIDE_PX, SIDE_PX))  # JPEG decodes to a smaller size by itself
                    small = ImageOps.exif_transpose(image)
                    small.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR, reducing_gap=2.0)
                    small.convert("RGBA" if "A" in small.getbands() else "RGB").save(content, format="WEBP", quality=80, method=2)
            except UNREADABLE:
                return False
        replace_content(file, content.getvalue())
        self._num_written += 1
        if self._num_written % CHECK_EVERY == 0:
            self._prune()
        return True

    def _prune(self) -> None:
        files = sorted(self.folder.glob("??/*.webp"), key=lambda path: path.stat().st_mtime_ns)
        for file in files[: max(0, len(files) - MAX_KEPT)]:
            file.unlink(missing_ok=True)
