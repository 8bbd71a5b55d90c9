"""A request carried out as the Script dropdown says: by the selected script, else by process_images."""

from __future__ import annotations

from modules.processing import Processed, StableDiffusionProcessing, process_images


def process_with_scripts(p: StableDiffusionProcessing) -> Processed:
    """The pictures of `p`. Raises RequestError, and what the selected script raises."""
    if p.scripts is not None and p.script_args:
        processed: Processed | None = p.scripts.run(p, *p.script_args)
        if processed is not None:
            return processed
    return process_images(p)
