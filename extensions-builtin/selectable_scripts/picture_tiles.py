"""Tiles of a large picture that go through img2img: as many at once as a batch or the slots take, each with a seed of its own.

A tile's picture depends on its seed alone, so how many run together changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from script_jobs import Part, copy_request, part_of

from backend import memory_management
from modules.processing import StableDiffusionProcessingImg2Img, process_images


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A part of a picture, and the mask (L, white is repainted) of what is to be made in it; None repaints all of it."""

    picture: Image.Image
    mask: Image.Image | None = None


def tiles_at_once(p: StableDiffusionProcessingImg2Img) -> int:
    """The request's batch size, or one tile per slot if there are more slots."""
    return max(int(p.batch_size), len(memory_management.current_store().slots))


def make_tiles(p: StableDiffusionProcessingImg2Img, tiles: Sequence[Tile], first_seed: int) -> list[Part]:
    """The request for each tile, in order; tile number n has the seed `first_seed` + n. Fewer if the job was interrupted.

    Tiles with masks run one by one, because a job has one mask.
    """
    state, done, first = p.context.state, list[Part](), 0
    while first < len(tiles) and not (state.interrupted or state.stopping_generation):
        masked = tiles[first].mask is not None
        together = tiles[first : first + (1 if masked else tiles_at_once(p))]
        one = copy_request(p)
        one.n_iter, one.batch_size, one.seed = 1, len(together), first_seed + first
        one.do_not_save_samples = one.do_not_save_grid = True
        one.init_images = [tile.picture for tile in together]
        one.image_mask = one.latent_mask = None
        if masked:
            one.image_mask = together[0].mask
        else:
            one.mask_blur_x = one.mask_blur_y = 0
        made = part_of(process_images(one))
        if len(made.pictures) < len(together):
            break
        done.append(made)
        first += len(together)
    return done


def pictures_of(parts: Sequence[Part]) -> list[Image.Image]:
    """All pictures of some parts, in order."""
    return [picture for part in parts for picture, _ in part.pictures]
