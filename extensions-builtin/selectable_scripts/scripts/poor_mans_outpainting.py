"""Poor man's outpainting: the picture on a larger canvas, whose new part is inpainted tile by tile."""

from __future__ import annotations

from typing import Any

import gradio as gr
from outpainting import DIRECTIONS, choose_margins, enlarge_canvas
from picture_tiles import Tile, make_tiles, pictures_of
from script_jobs import Part, together

from modules import images, scripts
from modules.errors import RequestError
from modules.processing import Processed, StableDiffusionProcessingImg2Img, fix_seed

FILLS = ("fill", "original", "latent noise", "latent nothing")


class Script(scripts.Script):
    """Width and height of the request are those of a tile."""

    def title(self) -> str:
        return "Poor man's outpainting"

    def show(self, is_img2img: bool) -> Any:
        return is_img2img

    def ui(self, is_img2img: bool) -> list[Any]:
        pixels = gr.Slider(label="Pixels to expand", minimum=8, maximum=256, step=8, value=128, elem_id=self.elem_id("pixels"))
        blur = gr.Slider(label="Mask blur", minimum=0, maximum=64, step=1, value=4, elem_id=self.elem_id("mask_blur"))
        fill = gr.Radio(label="Masked content", choices=list(FILLS), value=FILLS[0], type="index", elem_id=self.elem_id("inpainting_fill"))
        directions = gr.CheckboxGroup(
            label="Outpainting direction", choices=list(DIRECTIONS), value=list(DIRECTIONS), elem_id=self.elem_id("direction")
        )
        return [pixels, blur, fill, directions]

    def run(self, p: StableDiffusionProcessingImg2Img, *args: Any) -> Processed:  # type: ignore[override]
        """Raises RequestError for values that there are not."""
        pixels, blur, fill, directions = scripts.checked_values(
            self, [args[0], args[1], FILLS.index(args[2]) if args[2] in FILLS else args[2], args[3]]
        )
        directions = chosen_directions(directions, self.title())
        if pixels >= min(p.width, p.height):
            raise RequestError(
                f"Poor man's outpainting: {pixels} px do not fit into tiles of {p.width}x{p.height}. Choose fewer pixels or larger tiles."
            )
        fix_seed(p)
        picture = images.flatten(p.init_images[0], p.options.img2img_background_color)
        canvas = enlarge_canvas(picture, choose_margins(picture.width, picture.height, directions, pixels))
        mask = canvas.mask(2 * blur)
        p.inpaint_full_res, p.inpainting_mask_invert, p.inpainting_fill = False, False, fill
        p.mask_blur_x = p.mask_blur_y = blur
        grid = images.split_grid(canvas.picture, tile_w=p.width, tile_h=p.height, overlap=pixels)
        work = []
        for top, _, row in grid.tiles:
            for piece in row:
                part = mask.crop((piece[0], top, piece[0] + p.width, top + p.height))
                if canvas.new.crop((piece[0], top, piece[0] + p.width, top + p.height)).getbbox() is not None:
                    work.append((piece, Tile(picture=piece[2], mask=part)))
        p.context.state.job_count = len(work)
        done = make_tiles(p, [tile for _, tile in work], int(p.seed))
        if len(done) < len(work):
            raise RequestError("Poor man's outpainting: the job was interrupted before its picture was whole.")
        for (piece, _), made in zip(work, pictures_of(done)):
            piece[2] = made
        result = images.combine_grid(grid)
        text = done[0].pictures[0][1]
        if p.options.samples_save and not p.do_not_save_samples:
            images.save_image(result, p.outpath_samples or "", "", done[0].seeds[0], p.prompt, p.options.samples_format, info=text, p=p)
        processed = together(p, list[Part](done[:1]), show_pictures=False)
        processed.images, processed.infotexts, processed.info = [result], [text], text
        return processed


def chosen_directions(directions: Any, title: str) -> list[str]:
    """The directions of a request. Raises RequestError for none and for others."""
    wanted = list(directions) if isinstance(directions, (list, tuple)) else [directions]
    if not wanted or any(one not in DIRECTIONS for one in wanted):
        raise RequestError(f"{title}: directions are {wanted!r}; choose one or more of {', '.join(DIRECTIONS)}.")
    return [one for one in DIRECTIONS if one in wanted]
