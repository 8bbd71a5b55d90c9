"""Outpainting mk2: one direction after the other; the new part starts as noise with the spectrum and the colors of the picture."""

from __future__ import annotations

from typing import Any

import gradio as gr
from outpainting import DIRECTIONS, Canvas, Margins, enlarge_canvas, fill_with_matched_noise, round_up, strip_beside
from PIL import Image
from script_jobs import Part, copy_request, part_of, put_grid_in_front, together

from modules import images, scripts
from modules.errors import RequestError
from modules.processing import Processed, StableDiffusionProcessingImg2Img, fix_seed, process_images

ABOUT = "<p>Recommended: 80 to 100 sampling steps, sampler Euler a, denoising strength 0.8.</p>"


class Script(scripts.Script):
    """Width and height of the request are how deep the redrawn strip is, with what it sees of the picture."""

    def title(self) -> str:
        return "Outpainting mk2"

    def show(self, is_img2img: bool) -> Any:
        return is_img2img

    def ui(self, is_img2img: bool) -> list[Any]:
        about = gr.HTML(ABOUT, elem_id=self.elem_id("info"))
        pixels = gr.Slider(label="Pixels to expand", minimum=8, maximum=256, step=8, value=128, elem_id=self.elem_id("pixels"))
        blur = gr.Slider(label="Mask blur", minimum=0, maximum=64, step=1, value=8, elem_id=self.elem_id("mask_blur"))
        directions = gr.CheckboxGroup(
            label="Outpainting direction", choices=list(DIRECTIONS), value=list(DIRECTIONS), elem_id=self.elem_id("direction")
        )
        falloff = gr.Slider(
            label="Fall-off exponent (lower=higher detail)", minimum=0.0, maximum=4.0, step=0.01, value=1.0, elem_id=self.elem_id("noise_q")
        )
        variation = gr.Slider(label="Color variation", minimum=0.0, maximum=1.0, step=0.01, value=0.05, elem_id=self.elem_id("color_variation"))
        return [about, pixels, blur, directions, falloff, variation]

    def run(self, p: StableDiffusionProcessingImg2Img, *args: Any) -> Processed:  # type: ignore[override]
        """Raises RequestError for values that there are not."""
        _, pixels, blur, directions, falloff, variation = scripts.checked_values(self, args)
        wanted = list(directions) if isinstance(directions, (list, tuple)) else [directions]
        if not wanted or any(one not in DIRECTIONS for one in wanted):
            raise RequestError(f"Outpainting mk2: directions are {wanted!r}; choose one or more of {', '.join(DIRECTIONS)}.")
        fix_seed(p)
        directions = [one for one in DIRECTIONS if one in wanted]
        num_results, state = max(1, p.n_iter * p.batch_size), p.context.state
        state.job_count = num_results * len(directions)
        start = images.flatten(p.init_images[0], p.options.img2img_background_color)
        parts, results = list[Part](), list[tuple[Image.Image, str]]()
        for number in range(num_results):
            picture, made = start, None
            for direction in directions:
                if state.interrupted or state.stopping_generation:
                    break
                seed = int(p.seed) + number
                picture, made = self._expand(p, picture, direction, pixels, blur, (falloff, variation), seed)
            if made is None or state.interrupted:
                break
            parts.append(made)
            results.append((picture, made.pictures[0][1]))
            if p.options.samples_save and not p.do_not_save_samples:
                images.save_image(picture, p.outpath_samples or "", "", seed, p.prompt, p.options.samples_format, info=results[-1][1], p=p)
        if not results:
            raise RequestError("Outpainting mk2: the job was interrupted before its first picture.")
        processed = together(p, parts, show_pictures=False)
        processed.images, processed.infotexts = [picture for picture, _ in results], [text for _, text in results]
        processed.info = processed.infotexts[0]
        if p.options.return_grid and len(results) > 1 and images.check_grid_size(processed.images):
            put_grid_in_front(p, processed, images.image_grid(processed.images), save=bool(p.options.grid_save and not p.do_not_save_grid))
        return processed

    def _expand(
        self, p: StableDiffusionProcessingImg2Img, picture: Image.Image, direction: str, pixels: int, blur: int, noise: tuple[float, float], seed: int
    ) -> tuple[Image.Image, Part]:
        """The picture larger in one direction."""
        canvas = enlarge_canvas(picture, Margins(**{direction: pixels}))
        filled = fill_with_matched_noise(canvas, falloff=noise[0], color_variation=noise[1], seed=seed)
        box = strip_beside(canvas, direction, p.width if direction in ("left", "right") else p.height)
        made = part_of(process_images(self._strip_request(p, canvas, filled, box, blur, seed)))
        strip = made.pictures[0][0].resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS)
        canvas.picture.paste(strip, box[:2])
        return canvas.picture, made

    def _strip_request(
        self, p: StableDiffusionProcessingImg2Img, canvas: Canvas, filled: Image.Image, box: tuple[int, int, int, int], blur: int, seed: int
    ) -> StableDiffusionProcessingImg2Img:
        one = copy_request(p)
        one.n_iter, one.batch_size, one.seed = 1, 1, seed
        one.do_not_save_samples = one.do_not_save_grid = True
        one.init_images = [filled.crop(box)]
        one.width, one.height = round_up(box[2] - box[0]), round_up(box[3] - box[1])
        one.image_mask, one.latent_mask = canvas.mask(2 * blur).crop(box), None
        one.mask_blur_x = one.mask_blur_y = blur
        one.inpaint_full_res, one.inpainting_mask_invert, one.inpainting_fill, one.resize_mode = False, False, 1, 0
        return one
