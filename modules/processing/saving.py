"""Saves a job's pictures beside its next steps. An unwritable folder loses the file, not the picture: the job continues and reports what was not
saved."""

from __future__ import annotations

import contextvars
import copy
import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from backend import profiler
from modules.pictures import images
from modules.scripts.callbacks import is_listened_to

if TYPE_CHECKING:
    from PIL import Image

    from modules.processing import StableDiffusionProcessing

log = logging.getLogger(__name__)

MOST_PENDING = 8
"""Pictures that may wait to be encoded; they are held in memory."""


class PictureSaver:
    """Saves one job's pictures in order, on a thread of its own: encoding takes as long as a few steps. `wait` before the job's result is used.

    If an extension listens to saving, pictures are saved on the job's thread, where it may look at the request.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: deque[Future[Any]] = deque()

    def save(self, p: StableDiffusionProcessing, image: Image.Image, folder: str | None, *args: Any, **fields: Any) -> None:
        """`save_or_comment` with the request as it is now: its current batch and picture go into the file's name."""
        if is_listened_to("before_image_saved", "image_saved"):
            _save(p, image, folder, *args, **fields)
            return
        self._thread = self._thread or ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._pending.append(self._thread.submit(contextvars.copy_context().run, _save, copy.copy(p), image, folder, *args, **fields))
        while len(self._pending) > MOST_PENDING:
            self._pending.popleft().result()

    def wait(self) -> None:
        """Return when every picture is on disk or its failure is among the job's comments. Raises: what a save raised beyond that."""
        pending, self._pending = self._pending, deque()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        for saved in pending:
            saved.result()


def _save(p: StableDiffusionProcessing, image: Image.Image, folder: str | None, *args: Any, **fields: Any) -> None:
    with profiler.recorder().measure("save", "save a picture"):
        save_or_comment(p, image, folder, *args, **fields)


def save_or_comment(p: StableDiffusionProcessing, image: Image.Image, folder: str | None, *args: Any, **fields: Any) -> str | None:
    """`images.save_image` for the job `p`. Returns the file's path, or None after adding a comment with the reason."""
    try:
        return images.save_image(image, folder or "", *args, **{**fields, "p": p})[0]
    except (OSError, ValueError) as error:  # ValueError: a NUL in the folder's name
        reason = str(error) if isinstance(error, images.ImageSaveError) else f"cannot write into {str(folder)!a}: {error}."
        log.warning("A picture was not saved: %s", reason)
        p.comment(f"Not saved: {reason}")
        return None
