"""Runs a request with the script selected in the Script dropdown, or with process_images if none is selected."""

from __future__ import annotations

from modules.processing import Processed, StableDiffusionProcessing, process_images


def process_with_scripts(p: StableDiffusionProcessing) -> Processed:
    """The pictures of `p`. Raises RequestError, and whatever the selected script raises."""
    if p.scripts is not None and p.script_args:
        processed: Processed | None = p.scripts.run(p, *p.script_args)
        if processed is not None:
            return processed
    return process_images(p)
