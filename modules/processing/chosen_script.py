"""Runs a request with the script selected in the Script dropdown, or with process_images if none is selected."""

from __future__ import annotations

from collections.abc import Callable

from modules.processing import Processed, StableDiffusionProcessing, process_images, set_folders


def process_with_scripts(p: StableDiffusionProcessing, process: Callable[[StableDiffusionProcessing], Processed] = process_images) -> Processed:
    """The pictures of `p`, by its script or by `process`. Raises RequestError, and whatever the selected script raises."""
    if p.scripts is not None and p.script_args:
        set_folders(p)  # scripts save pictures of their own, of the API's requests too
        processed: Processed | None = p.scripts.run(p, *p.script_args)
        if processed is not None:
            return processed
    return process(p)
