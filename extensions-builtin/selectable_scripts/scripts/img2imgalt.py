"""img2img alternative test: finds the noise from which Euler makes the picture, and starts from it with another prompt."""

from __future__ import annotations

from typing import Any

import gradio as gr
import torch
from torch import Tensor

from backend.sampling.sampling_function import denoise_guided, sampling_cleanup, sampling_prepare
from modules import scripts
from modules.processing import Processed, StableDiffusionProcessingImg2Img, process_images
from modules.prompt_parser import SdConditioning
from modules.sd_samplers import create_sampler
from modules.sd_samplers_common import setup_img2img_steps

ABOUT = "The prompt that describes the picture goes into Original prompt; set CFG scale to 2 or less."


class Script(scripts.Script):
    """Overrides follow A1111: with them on, the controls of the tab below do not count."""

    def title(self) -> str:
        return "img2img alternative test"

    def show(self, is_img2img: bool) -> Any:
        return is_img2img

    def ui(self, is_img2img: bool) -> list[Any]:
        def checkbox(label: str, value: bool, name: str) -> Any:
            return gr.Checkbox(label=label, value=value, elem_id=self.elem_id(name))

        return [
            gr.Markdown(ABOUT, elem_id=self.elem_id("info")),
            checkbox("Override `Sampling method` to Euler?(this method is built for it)", True, "override_sampler"),
            checkbox("Override `prompt` to the same value as `original prompt`?(and `negative prompt`)", True, "override_prompt"),
            gr.Textbox(label="Original prompt", lines=1, elem_id=self.elem_id("original_prompt")),
            gr.Textbox(label="Original negative prompt", lines=1, elem_id=self.elem_id("original_negative_prompt")),
            checkbox("Override `Sampling Steps` to the same value as `Decode steps`?", True, "override_steps"),
            gr.Slider(label="Decode steps", minimum=1, maximum=150, step=1, value=50, elem_id=self.elem_id("st")),
            checkbox("Override `Denoising strength` to 1?", True, "override_strength"),
            gr.Slider(label="Decode CFG scale", minimum=0.0, maximum=15.0, step=0.1, value=1.0, elem_id=self.elem_id("cfg")),
            gr.Slider(label="Randomness", minimum=0.0, maximum=1.0, step=0.01, value=0.0, elem_id=self.elem_id("randomness")),
            checkbox("Sigma adjustment for finding noise for image", False, "sigma_adjustment"),
        ]

    def run(self, p: StableDiffusionProcessingImg2Img, *args: Any) -> Processed:  # type: ignore[override]
        """Raises RequestError for values that there are not."""
        (_, use_euler, use_prompt, prompt, negative, use_steps, steps, use_strength, scale, randomness, adjusts) = scripts.checked_values(self, args)
        if use_euler:
            p.sampler_name = "Euler"
        if use_prompt:
            p.prompt, p.negative_prompt = str(prompt or ""), str(negative or "")
        if use_steps:
            p.steps = steps
        if use_strength:
            p.denoising_strength = 1.0
        prompts = str(prompt or ""), str(negative or "")

        def sample(conditioning: Any, unconditional_conditioning: Any, **_: Any) -> Tensor:
            found = find_noise(p, prompts, steps, scale, adjusts=adjusts)
            noise = mix_noise(found, p.rng.first().to(found), randomness)
            p.sampler = create_sampler(p.sampler_name, p.sd_model)
            p.sd_model.forge_objects = p.sd_model.forge_objects_after_applying_lora.shallow_copy()
            num_steps, from_end = setup_img2img_steps(p)
            sigma = float(p.sampler.get_sigmas(p, num_steps)[num_steps - from_end - 1])
            start = noise - p.init_latent.to(noise) / sigma
            result: Tensor = p.sampler.sample_img2img(
                p, p.init_latent, start, conditioning, unconditional_conditioning, image_conditioning=p.image_conditioning
            )
            return result

        p.sample = sample  # type: ignore[method-assign]
        p.extra_generation_params.update(
            {
                "Decode prompt": prompts[0], "Decode negative prompt": prompts[1], "Decode CFG scale": scale, "Decode steps": steps,
                "Randomness": randomness, "Sigma Adjustment": adjusts,
            }
        )  # fmt: skip
        return process_images(p)


def mix_noise(found: Tensor, drawn: Tensor, randomness: float) -> Tensor:
    """Of the same deviation as both if they are independent."""
    return (found * (1 - randomness) + drawn * randomness) / (randomness**2 + (1 - randomness) ** 2) ** 0.5


@torch.no_grad()
def find_noise(p: StableDiffusionProcessingImg2Img, prompts: tuple[str, str], steps: int, scale: float, *, adjusts: bool) -> Tensor:
    """Noise (B, C, H, W) of deviation 1 that Euler turns into the initial latents: its steps backwards, from no noise to all of it.

    Each step takes the network's answer at the noise level it goes to (`adjusts`: at the one it comes from), because the point it comes from is not
    known. The result is divided by its deviation (`adjusts`: by the highest noise level).
    """
    unet, x_BCHW = p.sd_model.forge_objects.unet, p.init_latent.float()
    text_cond, text_uncond = (_encode(p, text, x_BCHW.shape[0], negative=number == 1) for number, text in enumerate(prompts))
    sigmas = p.sampler.get_sigmas(p, steps).flip(0).to(x_BCHW)
    sampling_prepare(unet, x_BCHW)
    try:
        for number in range(1, len(sigmas)):
            if p.context.state.interrupted:
                break
            sigma = sigmas[number - 1] if adjusts and number > 1 else sigmas[number]
            denoised_BCHW, _, _ = denoise_guided(
                unet, x_BCHW, sigma.expand(x_BCHW.shape[0]), text_cond=text_cond, text_uncond=text_uncond, cond_scale=scale,
                image_cond=p.image_conditioning if p.sd_model.is_inpaint else None,
            )  # fmt: skip
            x_BCHW = x_BCHW + (x_BCHW - denoised_BCHW) / sigma * (sigmas[number] - sigmas[number - 1])
    finally:
        sampling_cleanup(unet)
    return x_BCHW / sigmas[-1] if adjusts else x_BCHW / x_BCHW.std()


def _encode(p: StableDiffusionProcessingImg2Img, text: str, count: int, *, negative: bool) -> Any:
    """Conditions of `text` for `count` pictures."""
    return p.sd_model.get_learned_conditioning(SdConditioning([text] * count, is_negative_prompt=negative, width=p.width, height=p.height))
