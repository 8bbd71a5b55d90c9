"""The history of one application: the table, kept up to date by a thread of its own; the trash; thumbnails. Must not know HTTP or the page."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from modules.errors import RequestError
from modules.history.index import HistoryIndex, Picture
from modules.history.scanning import Scan
from modules.history.thumbnails import Thumbnails
from modules.history.trash import Trash, picture_below

log = logging.getLogger(__name__)

FIRST_ANSWER_S = 0.4


class HistoryBrowser:
    """Pictures below `root`. The table is `data_dir`/history.sqlite3."""

    def __init__(self, root: Path, data_dir: Path) -> None:
        self.root = root
        self.index = HistoryIndex(data_dir / "history.sqlite3")
        self.trash = Trash(root)
        self.thumbnails = Thumbnails(data_dir / "cache" / "thumbnails")
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._scan: threading.Thread | None = None

    def refresh(self, wait_s: float = FIRST_ANSWER_S) -> bool:
        """Look for new pictures on a thread of its own; waits for it `wait_s`. Returns whether it still looks."""
        with self._lock:
            if self._scan is None or not self._scan.is_alive():
                self._scan = threading.Thread(target=self._run, name="history-scan", daemon=True)
                self._scan.start()
            thread = self._scan
        thread.join(wait_s)
        return thread.is_alive()

    def _run(self) -> None:
        if not self.root.is_dir():
            return
        num_changed = Scan(self.index, self.root, self._stop).run()
        if num_changed:
            log.debug("history: %d pictures were added, changed or forgotten.", num_changed)

    def file_of(self, number: int) -> tuple[Picture, Path]:
        """The row and the file of a picture. Raises: RequestError if it is gone."""
        picture = self.index.find(number)
        if picture is None:
            raise RequestError("this picture is not in the list any more. Press Refresh.")
        return picture, picture_below(self.root, picture.path)

    def delete(self, number: int) -> str:
        """Move a picture into the trash; returns its path there. Raises: RequestError, OSError."""
        picture, _ = self.file_of(number)
        place = self.trash.delete(picture.path)
        self.index.forget([picture.path])
        return place

    def restore(self, path: str) -> str:
        """Put a picture back from the trash. Raises: RequestError, OSError."""
        return self.trash.restore(path)

    def close(self) -> None:
        """Stop looking and close the table."""
        self._stop.set()
        thread = self._scan
        if thread is not None:
            thread.join(5)
        self.index.close()
