"""Saves a job's pictures. An unwritable folder loses the file, not the picture: the job continues and reports what was not saved."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from modules.pictures import images

if TYPE_CHECKING:
    from PIL import Image

    from modules.processing import StableDiffusionProcessing

log = logging.getLogger(__name__)


def save_or_comment(p: StableDiffusionProcessing, image: Image.Image, folder: str | None, *args: Any, **fields: Any) -> str | None:
    """`images.save_image` for the job `p`. Returns the file's path, or None after adding a comment with the reason."""
    try:
        return images.save_image(image, folder or "", *args, **{**fields, "p": p})[0]
    except (OSError, ValueError) as error:  # ValueError: a NUL in the folder's name
        reason = str(error) if isinstance(error, images.ImageSaveError) else f"cannot write into {str(folder)!a}: {error}."
        log.warning("A picture was not saved: %s", reason)
        p.comment(f"Not saved: {reason}")
        return None
