"""What the scripts here have in common: a request that is used again for several jobs, and their results together."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from PIL import Image

from modules import images
from modules.processing import Processed, StableDiffusionProcessing


def copy_request(p: StableDiffusionProcessing) -> StableDiffusionProcessing:
    """`p` for a job of its own: what a job writes into the copy leaves `p` as it is."""
    one = copy.copy(p)
    for name in ("extra_generation_params", "override_settings", "comments"):
        setattr(one, name, dict(getattr(p, name)))
    one.styles = list(p.styles)
    one.extra_result_images = []
    if hasattr(one, "init_images"):
        one.init_images = list(one.init_images)
        one.mask, one.color_corrections, one.overlay_images, one.paste_to = None, None, None, None
    return one


def pictures_of(done: Processed) -> list[tuple[Image.Image, str]]:
    """The job's pictures with their parameters, without its grid."""
    first = done.index_of_first_image
    return list(zip(done.images[first:], done.infotexts[first:]))


def together(p: StableDiffusionProcessing, pictures: Sequence[tuple[Image.Image, str]], done: Sequence[Processed]) -> Processed:
    """One result of several jobs' pictures; `done` are those jobs' own."""
    first = done[0]
    return Processed(
        p,
        [picture for picture, _ in pictures],
        first.seed,
        pictures[0][1] if pictures else "",
        subseed=first.subseed,
        all_prompts=[prompt for one in done for prompt in one.all_prompts],
        all_negative_prompts=[prompt for one in done for prompt in one.all_negative_prompts],
        all_seeds=[seed for one in done for seed in one.all_seeds],
        all_subseeds=[seed for one in done for seed in one.all_subseeds],
        infotexts=[text for _, text in pictures],
        comments="".join(one.comments for one in done),
    )


def put_grid_in_front(p: StableDiffusionProcessing, result: Processed, grid: Image.Image, *, save: bool) -> None:
    """Show `grid` before the pictures of `result`, and save it as settings say."""
    infotext = result.infotexts[0] if result.infotexts else result.info
    result.images.insert(0, grid)
    result.infotexts.insert(0, infotext)
    result.index_of_first_image = result.index_of_first_image + 1
    if save:
        images.save_image(
            grid, p.outpath_grids or "", "grid", result.seed, result.prompt, p.options.grid_format, info=infotext, short_filename=True, grid=True, p=p
        )
