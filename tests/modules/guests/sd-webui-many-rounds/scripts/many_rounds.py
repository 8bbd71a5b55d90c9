"""A script of the dropdown that makes several jobs and a grid of them, one that looks into every step, and one for pictures that are ready."""

import copy
import math

import gradio as gr
import numpy as np
from PIL import Image, ImageOps

import modules.scripts as scripts
from modules import images, processing, shared
from modules.processing import Processed, process_images
from modules.script_callbacks import CFGDenoiserParams, on_cfg_after_cfg, on_cfg_denoiser, remove_callbacks_for_function
from modules.shared import opts, state


class ManyRounds(scripts.Script):
    def title(self):
        return "Many rounds"

    def show(self, is_img2img):
        return True

    def ui(self, is_img2img):
        rounds = gr.Slider(minimum=1, maximum=8, step=1, label="Rounds", value=2, elem_id=self.elem_id("rounds"))
        words = gr.Textbox(label="Words by round", lines=2, placeholder="one line a round", elem_id=self.elem_id("words")).style(container=False)
        make_grid = gr.Checkbox(label="Grid", value=True)
        return [rounds, words, make_grid]

    def run(self, p, rounds, words, make_grid):
        processing.fix_seed(p)
        lines = [x.strip() for x in (words or "").splitlines()] or [""]
        state.job_count = rounds * p.n_iter
        p.do_not_save_grid = True
        all_images, infotexts, first = [], [], None
        for n in range(int(rounds)):
            state.job = f"Round {n + 1} out of {rounds}"
            copy_p = copy.copy(p)
            copy_p.prompt = f"{p.prompt}, {lines[n % len(lines)]}" if lines[n % len(lines)] else p.prompt
            copy_p.extra_generation_params = {**p.extra_generation_params, "Round": n + 1}
            proc = process_images(copy_p)
            first = first or proc
            all_images += proc.images[proc.index_of_first_image :]
            infotexts += proc.infotexts[proc.index_of_first_image :]
            if state.interrupted or state.skipped:
                break
        processed = Processed(p, all_images, p.seed, infotexts[0], infotexts=infotexts)
        if make_grid and len(all_images) > 1:
            grid = images.image_grid(all_images, rows=round(math.sqrt(len(all_images))))
            processed.images.insert(0, grid)
            processed.infotexts.insert(0, infotexts[0])
            processed.index_of_first_image = 1
            if opts.grid_save:
                images.save_image(grid, p.outpath_grids, "rounds", info=infotexts[0], prompt=p.prompt, seed=p.seed, grid=True, p=p)
        return processed


class StepWatcher(scripts.Script):
    def __init__(self):
        self.steps = []
        self.shapes = set()
        self.pull = 0.0

    def title(self):
        return "Step watcher"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        with gr.Accordion("Step watcher", open=False):
            active = gr.Checkbox(label="Active", value=False)
            pull = gr.Number(label="Pull to the middle", value=0.02, precision=4)
        return [active, pull]

    def denoiser_callback(self, params: CFGDenoiserParams):
        self.steps.append((params.sampling_step, params.total_sampling_steps))
        self.shapes.add(tuple(params.x.shape))
        if hasattr(params.text_cond, "shape"):
            params.text_cond[..., : params.text_cond.shape[-1] // 2] *= 0.9

    def after_cfg_callback(self, params):
        params.x = params.x - self.pull * params.x.mean(dim=(2, 3), keepdim=True)

    def process_batch(self, p, active, pull, **kwargs):
        self.steps, self.shapes, self.pull = [], set(), float(pull)
        if active:
            on_cfg_denoiser(self.denoiser_callback)
            on_cfg_after_cfg(self.after_cfg_callback)

    def postprocess_batch(self, p, *args, **kwargs):
        remove_callbacks_for_function(self.denoiser_callback)
        remove_callbacks_for_function(self.after_cfg_callback)


class Frame(scripts.Script):
    def title(self):
        return "Frame"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        width = gr.Slider(0, 16, value=0, step=1, label="Frame px")
        colour = gr.ColorPicker(label="Frame colour", value="#ff0000")
        return [width, colour]

    def postprocess_image(self, p, pp, width, colour):
        if width:
            pp.image = ImageOps.expand(pp.image.crop((width, width, pp.image.width - width, pp.image.height - width)), border=width, fill=colour)

    def postprocess(self, p, processed, width, colour):
        if width and shared.opts.data.get("samples_save"):
            array = np.stack([np.asarray(image.convert("RGB")) for image in processed.images]).mean(axis=0)
            processed.images.append(Image.fromarray(array.astype(np.uint8)))
            processed.infotexts.append(processed.info)
