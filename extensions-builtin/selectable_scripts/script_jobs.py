"""Shared by the scripts here: copies of a request for several jobs, joining their results, and limits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from modules import images
from modules.processing import Processed, StableDiffusionProcessing

MAX_PICTURES = 10_000
"""Of one job of a script, like a request's largest batch count."""
MAX_PROMPT_CHARS = 100_000
"""As the API allows."""


def megapixels_of_grid(num_pictures: int, width_px: int, height_px: int, margin_px: int) -> float:
    """The size of a grid of that many pictures, with a margin at each."""
    return num_pictures * (width_px + margin_px) * (height_px + margin_px) / 1e6


def copy_request(p: StableDiffusionProcessing) -> StableDiffusionProcessing:
    """A copy of `p` for one job; whatever the job writes into it leaves `p` unchanged."""
    one = copy.copy(p)
    for name in ("extra_generation_params", "override_settings", "comments"):
        setattr(one, name, dict(getattr(p, name)))
    one.styles = list(p.styles)
    one.extra_result_images = []
    if hasattr(one, "init_images"):
        one.init_images = list(one.init_images)
        one.mask, one.color_corrections, one.overlay_images, one.paste_to = None, None, None, None
    return one


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some pictures of a job, their parameters, and the result they came from."""

    pictures: tuple[tuple[Image.Image, str], ...]
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    subseeds: tuple[int, ...]
    comments: str = ""


def part_of(done: Processed, first: int = 0, count: int | None = None) -> Part:
    """The job's pictures without its grid; with `count`, only that many, starting at number `first`."""
    chosen = slice(first, None if count is None else first + count)
    begin = done.index_of_first_image
    return Part(
        pictures=tuple(zip(done.images[begin:], done.infotexts[begin:]))[chosen],
        prompts=tuple(done.all_prompts[chosen]),
        negative_prompts=tuple(done.all_negative_prompts[chosen]),
        seeds=tuple(done.all_seeds[chosen]),
        subseeds=tuple(done.all_subseeds[chosen]),
        comments=done.comments if first == 0 else "",
    )


def together(p: StableDiffusionProcessing, parts: Sequence[Part], *, show_pictures: bool = True) -> Processed:
    """Join several jobs into one result with all their parameters, and with their pictures if `show_pictures`."""
    pictures = [picture for part in parts for picture in part.pictures] if show_pictures else []
    return Processed(
        p,
        [picture for picture, _ in pictures],
        parts[0].seeds[0],
        parts[0].pictures[0][1] if parts[0].pictures else "",
        subseed=parts[0].subseeds[0],
        all_prompts=[prompt for part in parts for prompt in part.prompts],
        all_negative_prompts=[prompt for part in parts for prompt in part.negative_prompts],
        all_seeds=[seed for part in parts for seed in part.seeds],
        all_subseeds=[seed for part in parts for seed in part.subseeds],
        infotexts=[text for _, text in pictures],
        comments="".join(dict.fromkeys(part.comments for part in parts)),
    )


def put_grid_in_front(p: StableDiffusionProcessing, result: Processed, grid: Image.Image, *, save: bool) -> None:
    """Put `grid` before the pictures of `result`, and save it if the settings ask for that."""
    infotext = result.infotexts[0] if result.infotexts else result.info
    result.images.insert(0, grid)
    result.infotexts.insert(0, infotext)
    result.index_of_first_image = result.index_of_first_image + 1
    if save:
        images.save_image(
            grid, p.outpath_grids or "", "grid", result.seed, result.prompt, p.options.grid_format, info=infotext, short_filename=True, grid=True, p=p
        )
