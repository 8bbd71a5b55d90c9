"""SD upscale: the picture enlarged, cut into overlapping tiles, each redrawn by img2img, and put together again."""

from __future__ import annotations

from typing import Any

import gradio as gr
from picture_tiles import Tile, make_tiles, pictures_of, tiles_at_once
from PIL import Image
from script_jobs import Part, together

from modules import images, scripts, shared
from modules.errors import RequestError
from modules.processing import Processed, StableDiffusionProcessingImg2Img, fix_seed
from modules.processing.validation import check_area

MAX_TILES = 4096


class Script(scripts.Script):
    """Width and height of the request are those of a tile."""

    def title(self) -> str:
        return "SD upscale"

    def show(self, is_img2img: bool) -> Any:
        return is_img2img

    def ui(self, is_img2img: bool) -> list[Any]:
        names = [upscaler.name for upscaler in shared.sd_upscalers]
        about = gr.HTML("<p>Enlarges the picture by the scale factor. Width and height are the size of a tile.</p>", elem_id=self.elem_id("info"))
        overlap = gr.Slider(minimum=0, maximum=256, step=16, label="Tile overlap", value=64, elem_id=self.elem_id("overlap"))
        factor = gr.Slider(minimum=1.0, maximum=4.0, step=0.05, label="Scale Factor", value=2.0, elem_id=self.elem_id("scale_factor"))
        upscaler = gr.Radio(label="Upscaler", choices=names, value=names[0], type="index", elem_id=self.elem_id("upscaler_index"))
        return [about, overlap, upscaler, factor]

    def run(self, p: StableDiffusionProcessingImg2Img, *args: Any) -> Processed:  # type: ignore[override]
        """Raises RequestError for values that there are not, and for too many tiles."""
        _, overlap, upscaler, factor = scripts.checked_values(self, self._with_index(args))
        if overlap >= min(p.width, p.height):
            raise RequestError(f"SD upscale: tiles of {p.width}x{p.height} cannot overlap by {overlap} px. Choose a smaller overlap or larger tiles.")
        fix_seed(p)
        p.extra_generation_params["SD upscale overlap"] = overlap
        p.extra_generation_params["SD upscale upscaler"] = shared.sd_upscalers[upscaler].name
        large = self._enlarge(p, upscaler, factor)
        grid = images.split_grid(large, tile_w=p.width, tile_h=p.height, overlap=overlap)
        tiles = [Tile(picture=piece[2]) for _, _, row in grid.tiles for piece in row]
        if len(tiles) > MAX_TILES:
            raise RequestError(f"SD upscale: {large.width}x{large.height} is {len(tiles)} tiles; {MAX_TILES} at most. Choose larger tiles.")
        p.inpaint_full_res, p.mask = False, None
        p.context.state.job_count = -(-len(tiles) // tiles_at_once(p)) * p.n_iter
        results, parts = list[tuple[Image.Image, str]](), list[Part]()
        for number in range(p.n_iter):
            done = make_tiles(p, tiles, int(p.seed) + number)
            made = pictures_of(done)
            if len(made) < len(tiles):
                break
            for piece, picture in zip((piece for _, _, row in grid.tiles for piece in row), made):
                piece[2] = picture
            results.append((images.combine_grid(grid), done[0].pictures[0][1]))
            parts.append(done[0])
            self._save(p, results[-1], done[0].seeds[0])
        if not results:
            raise RequestError("SD upscale: the job was interrupted before its first picture.")
        processed = together(p, parts, show_pictures=False)
        processed.images, processed.infotexts = [picture for picture, _ in results], [text for _, text in results]
        processed.info = processed.infotexts[0]
        return processed

    def _with_index(self, args: tuple[Any, ...]) -> list[Any]:
        """An upscaler by its name, as API clients may send it, is its number."""
        values, names = list(args), [upscaler.name for upscaler in shared.sd_upscalers]
        if isinstance(values[2], str):
            values[2] = names.index(values[2]) if values[2] in names else values[2]
        return values

    @staticmethod
    def _enlarge(p: StableDiffusionProcessingImg2Img, upscaler: int, factor: float) -> Image.Image:
        image = images.flatten(p.init_images[0], p.options.img2img_background_color)
        check_area(int(image.width * factor), int(image.height * factor))
        chosen = shared.sd_upscalers[upscaler]
        enlarged: Image.Image = image if chosen.name == "None" else chosen.scaler.upscale(image, factor, chosen.data_path)
        return enlarged

    @staticmethod
    def _save(p: StableDiffusionProcessingImg2Img, result: tuple[Image.Image, str], seed: int) -> None:
        if p.options.samples_save and not p.do_not_save_samples:
            images.save_image(result[0], p.outpath_samples or "", "", seed, p.prompt, p.options.samples_format, info=result[1], p=p)
