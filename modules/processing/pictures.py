"""Turns a batch's samples into finished pictures: hooks, pasting back, infotext, saving, grid, and the job's result.

Must not know sampling. The request (`p`) already has its prompts, seeds and settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from modules.pictures import images
from modules.processing.compositing import apply_color_correction, apply_overlay, uncrop
from modules.processing.latents import pixels_to_pil
from modules.processing.result import Processed, create_infotext
from modules.processing.saving import PictureSaver
from modules.scripts.hook_arguments import PostprocessBatchListArgs, PostprocessImageArgs, PostProcessMaskOverlayArgs

if TYPE_CHECKING:
    from modules.jobs.state import State
    from modules.processing.request import StableDiffusionProcessing

# suffixes of the mask files that extensions write next to a picture
_SUFFIX_MASK, _SUFFIX_COMPOSITE = "-mask", "-mask-composite"
_SUFFIX_BEFORE_COLOR = "-before-color-correction"


class PictureCollector:
    """Collects the pictures of one job with their infotexts and saves each when finished."""

    def __init__(self, p: StableDiffusionProcessing, state: State) -> None:
        self.p = p
        self.state = state
        self.saver = PictureSaver()
        self.images: list[Image.Image] = []
        self.infotexts: list[str] = []
        self.incomplete: list[int] = []
        self.index_of_first_image = 0

    def infotext(self, place: int, *, use_main_prompt: bool = False) -> str:
        """The parameters of the job's picture `place`."""
        p = self.p
        last = len(p.all_prompts) - 1
        return create_infotext(p, p.all_prompts, p.all_seeds, p.all_subseeds, index=min(place, last), use_main_prompt=use_main_prompt)

    def add_batch(self, decoded: list[Tensor]) -> None:
        """Finish the pictures of the current batch. `decoded`: CHW, -1..1."""
        p = self.p
        pixels_BCHW = torch.stack([sample.float() for sample in decoded]).add(1).div(2).clamp(0, 1)
        p.run_hook("postprocess_batch", images=pixels_BCHW, batch_number=p.iteration)
        batch = PostprocessBatchListArgs(list(pixels_BCHW))
        p.run_hook_with("postprocess_batch_list", batch, batch_number=p.iteration)
        for index, pixels_CHW in enumerate(batch.images):
            p.batch_index = index
            self._add_picture(index, pixels_to_pil(pixels_CHW))

    def _add_picture(self, index: int, image: Image.Image) -> None:
        p = self.p
        place = p.iteration * p.batch_size + index
        finished = PostprocessImageArgs(image, place)
        p.run_hook_with("postprocess_image", finished)
        image = self._match_colors(index, place, finished.image)
        image = self._paste_back(index, place, image)
        self.add_finished(place, image, self.infotext(place))

    def add_finished(self, place: int, image: Image.Image, text: str, *, is_complete: bool | None = None) -> None:
        """Save and keep picture `place` of the job, whose parameters are `text`.

        `is_complete`: whether all its steps were run, for a picture of another machine; of one made here the job's state tells.
        """
        p = self.p
        if is_complete is None:
            is_complete, saves = not (self.state.interrupted or self.state.skipped), p.save_samples()
        else:
            saves = p.options.samples_save and not p.do_not_save_samples and (is_complete or p.options.save_incomplete_images)
        if not is_complete:
            self.incomplete.append(len(self.images))
        if p.options.enable_pnginfo:
            image.info["parameters"] = text
        if saves:
            self._save(image, p.outpath_samples, place, text)
        self.images.append(image)
        self.infotexts.append(text)
        self.state.assign_current_image(image)

    def _match_colors(self, index: int, place: int, image: Image.Image) -> Image.Image:
        p = self.p
        if not p.color_corrections or index >= len(p.color_corrections):
            return image
        if p.save_samples() and p.options.save_images_before_color_correction:
            before = self._composed(index, image)[0]
            self._save(before, p.outpath_samples, place, self.infotext(place), suffix=_SUFFIX_BEFORE_COLOR)
        return apply_color_correction(p.color_corrections[index], image)

    def _composed(self, index: int, image: Image.Image) -> tuple[Image.Image, Image.Image]:
        overlays = self.p.overlay_images or []
        return apply_overlay(image, self.p.paste_to, overlays[index] if index < len(overlays) else None)

    def _paste_back(self, index: int, place: int, image: Image.Image) -> Image.Image:
        """Put the untouched parts of the original on top of the result."""
        p = self.p
        mask = getattr(p, "mask_for_overlay", None)
        if mask is not None or p.overlay_images:
            overlays = p.overlay_images or []
            shown = PostProcessMaskOverlayArgs(index, mask, overlays[index] if index < len(overlays) else None)
            p.run_hook_with("postprocess_maskoverlay", shown)
            image, alone = apply_overlay(image, p.paste_to, shown.overlay_image)
            self._add_mask_pictures(place, alone, shown.mask_for_overlay)
        composed = PostprocessImageArgs(image, place)
        p.run_hook_with("postprocess_image_after_composite", composed)
        return composed.image

    def _add_mask_pictures(self, place: int, alone: Image.Image, mask: Image.Image | None) -> None:
        """Add the mask and the masked part as separate pictures, if the settings say so."""
        p, options = self.p, self.p.options
        if mask is None:
            return
        wanted = (
            (options.save_mask, options.return_mask, _SUFFIX_MASK, lambda: mask.convert("RGB")),
            (options.save_mask_composite, options.return_mask_composite, _SUFFIX_COMPOSITE, lambda: _masked_part(alone, mask, p)),
        )
        for save, show, suffix, make in wanted:
            if not (save or show):
                continue
            picture = make()
            if save and p.save_samples():
                self._save(picture, p.outpath_samples, place, self.infotext(place), suffix=suffix)
            if show:
                p.extra_result_images.append(picture)

    def _save(self, image: Image.Image, folder: str | None, place: int, text: str, *, suffix: str = "") -> None:
        p = self.p
        place = min(place, len(p.all_seeds) - 1)
        seed, prompt = p.all_seeds[place], p.all_prompts[place]
        self.saver.save(p, image, folder, "", seed, prompt, p.options.samples_format, info=text, suffix=suffix)

    def finish(self) -> Processed:
        """Add the grid and return the result."""
        p = self.p
        self._add_grid()
        self.saver.wait()
        text = self.infotexts[0] if self.infotexts else self.infotext(0)
        processed = Processed(
            p,
            images_list=self.images,
            seed=p.all_seeds[0],
            info=text,
            subseed=p.all_subseeds[0],
            index_of_first_image=self.index_of_first_image,
            infotexts=self.infotexts,
            extra_images_list=p.extra_result_images,
        )
        processed.incomplete = self.incomplete
        return processed

    def _add_grid(self) -> None:
        p, options = self.p, self.p.options
        too_few = len(self.images) < 2 and options.grid_only_if_multiple
        if not self.images or too_few or p.do_not_save_grid or not (options.return_grid or options.grid_save):
            return
        if not images.check_grid_size(self.images):
            p.comment(f"No grid was created: it would be larger than {options.img_max_size_mp} megapixels (setting img_max_size_mp).")
            return
        grid = images.image_grid(self.images, p.batch_size)
        text = self.infotext(0, use_main_prompt=True)
        if options.enable_pnginfo:
            grid.info["parameters"] = text
        if options.grid_save:
            self._save_grid(grid, text)
        if options.return_grid:
            self.images.insert(0, grid)
            self.infotexts.insert(0, text)
            self.index_of_first_image = 1

    def _save_grid(self, grid: Image.Image, text: str) -> None:
        p, options = self.p, self.p.options
        self.saver.save(
            p,
            grid,
            p.outpath_grids,
            "grid",
            p.all_seeds[0],
            p.all_prompts[0],
            options.grid_format,
            info=text,
            short_filename=not options.grid_extended_filename,
            grid=True,
        )


def _masked_part(alone: Image.Image, mask: Image.Image, p: StableDiffusionProcessing) -> Image.Image:
    """The result alone, transparent where the mask is empty."""
    size_px = mask.size
    if alone.size != size_px:
        alone = uncrop(alone, size_px, p.paste_to) if p.paste_to is not None else alone.resize(size_px)
    part = alone.convert("RGBA")
    part.putalpha(mask.convert("L"))
    return part
