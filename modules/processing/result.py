"""The result of a job (Processed), and the infotext that records how each picture was made.

Reads a finished or running request. Must not know sampling, files or the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from modules.infotext.text import build_infotext
from modules.launch.version import program_version
from modules.processing.model_facts import takes_distilled_guidance

if TYPE_CHECKING:
    from modules.processing.request import StableDiffusionProcessing

# request fields that Processed copies unchanged
_COPIED_FIELDS = (
    "prompt",
    "negative_prompt",
    "seed",
    "subseed",
    "subseed_strength",
    "width",
    "height",
    "sampler_name",
    "cfg_scale",
    "steps",
    "batch_size",
    "restore_faces",
    "sd_model_name",
    "sd_model_hash",
    "sd_vae_name",
    "sd_vae_hash",
    "seed_resize_from_w",
    "seed_resize_from_h",
    "denoising_strength",
    "extra_generation_params",
    "styles",
    "eta",
    "ddim_discretize",
    "s_churn",
    "s_tmin",
    "s_tmax",
    "s_noise",
    "s_min_uncond",
    "sampler_noise_scheduler_override",
    "is_using_inpainting_conditioning",
)

# the keys of `info` in an API answer, in the API's order
_JS_KEYS = (
    "prompt",
    "all_prompts",
    "negative_prompt",
    "all_negative_prompts",
    "seed",
    "all_seeds",
    "subseed",
    "all_subseeds",
    "subseed_strength",
    "width",
    "height",
    "sampler_name",
    "cfg_scale",
    "steps",
    "batch_size",
    "restore_faces",
    "face_restoration_model",
    "sd_model_name",
    "sd_model_hash",
    "sd_vae_name",
    "sd_vae_hash",
    "seed_resize_from_w",
    "seed_resize_from_h",
    "denoising_strength",
    "extra_generation_params",
    "index_of_first_image",
    "infotexts",
    "styles",
    "job_timestamp",
    "clip_skip",
    "is_using_inpainting_conditioning",
    "version",
)


class Processed:
    """The pictures of a job and the parameters they were made with. `images` starts with the grid if there is one.

    `incomplete`: which pictures, not counting the grid, were interrupted or skipped before their last step.
    """

    incomplete: list[int] = []

    def __init__(
        self,
        p: StableDiffusionProcessing,
        images_list: Sequence[Image.Image],
        seed: int = -1,
        info: str = "",
        subseed: int | None = None,
        all_prompts: list[str] | None = None,
        all_negative_prompts: list[str] | None = None,
        all_seeds: list[int] | None = None,
        all_subseeds: list[int] | None = None,
        index_of_first_image: int = 0,
        infotexts: list[str] | None = None,
        comments: str = "",
        extra_images_list: Sequence[Image.Image] = (),
    ) -> None:
        for name in _COPIED_FIELDS:
            setattr(self, name, getattr(p, name))
        self.images = list(images_list)
        self.extra_images = list(extra_images_list)
        self.info = info
        self.comments = comments or "".join(f"{comment}\n" for comment in p.comments)
        self.image_cfg_scale = getattr(p, "image_cfg_scale", None)
        self.index_of_first_image = index_of_first_image
        self.job_timestamp = p.job_timestamp
        self.clip_skip = int(p.options.CLIP_stop_at_last_layers)
        self.face_restoration_model = p.options.face_restoration_model if p.restore_faces else None
        self.token_merging_ratio = p.token_merging_ratio
        self.token_merging_ratio_hr = p.token_merging_ratio_hr
        self.version = program_version()
        self._set_lists(p, all_prompts, all_negative_prompts, all_seeds, all_subseeds)
        self.prompt = _first(p.prompt)
        self.negative_prompt = _first(p.negative_prompt)
        self.seed = int(_first(p.seed if seed == -1 else seed))
        self.subseed = int(_first(p.subseed if subseed is None else subseed))
        self.infotexts = infotexts or [info] * len(self.images)

    def _set_lists(
        self,
        p: StableDiffusionProcessing,
        prompts: list[str] | None,
        negative_prompts: list[str] | None,
        seeds: list[int] | None,
        subseeds: list[int] | None,
    ) -> None:
        self.all_prompts = prompts or p.all_prompts or [_first(p.prompt)]
        self.all_negative_prompts = negative_prompts or p.all_negative_prompts or [_first(p.negative_prompt)]
        self.all_seeds = seeds or p.all_seeds or [_first(p.seed)]
        self.all_subseeds = subseeds or p.all_subseeds or [_first(p.subseed)]

    def js(self) -> str:
        """The parameters as JSON under the keys of the API's `info`, with the job's messages to the user as `comments`."""
        facts = {key: getattr(self, key) for key in _JS_KEYS}
        facts["comments"] = [line for line in str(self.comments).splitlines() if line.strip()]
        return json.dumps(facts, default=_json_fallback)

    def infotext(self, p: StableDiffusionProcessing, index: int) -> str:
        """The parameters of picture `index`, not counting the grid."""
        batch_size = max(self.batch_size, 1)  # type: ignore[attr-defined]  # copied from the request
        return create_infotext(
            p,
            self.all_prompts,
            self.all_seeds,
            self.all_subseeds,
            comments=[],
            position_in_batch=index % batch_size,
            iteration=index // batch_size,
        )

    def get_token_merging_ratio(self, for_hr: bool = False) -> float:
        return self.token_merging_ratio_hr if for_hr else self.token_merging_ratio


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and value else value


def _json_fallback(value: Any) -> Any:
    """Fallback for values that extensions put into extra_generation_params: a function becomes its text, anything else its type's name."""
    return str(value)


def process_extra_images(processed: Processed) -> None:
    """Keep only pictures among the extra images of a job: arrays from extensions become pictures, anything else is dropped."""
    given: list[Any] = list(processed.extra_images)
    found = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in given]
    processed.extra_images = [image for image in found if isinstance(image, Image.Image)]


def create_infotext(
    p: StableDiffusionProcessing,
    all_prompts: Sequence[str] | None,
    all_seeds: Sequence[int] | None,
    all_subseeds: Sequence[int] | None,
    comments: Mapping[str, int] | Sequence[str] | None = None,
    iteration: int = 0,
    position_in_batch: int = 0,
    use_main_prompt: bool = False,
    index: int | None = None,
    all_negative_prompts: Sequence[str] | None = None,
) -> str:
    """The parameters of one picture as text. `use_main_prompt` is for a grid: the prompt as typed and the first seed."""
    place = 0 if use_main_prompt else (position_in_batch + iteration * p.batch_size if index is None else index)
    prompts = all_prompts if all_prompts is not None else p.all_prompts
    negative_prompts = all_negative_prompts if all_negative_prompts is not None else p.all_negative_prompts
    seeds = all_seeds if all_seeds is not None else p.all_seeds
    subseeds = all_subseeds if all_subseeds is not None else p.all_subseeds
    prompt = p.main_prompt if use_main_prompt else prompts[place]
    negative_prompt = p.main_negative_prompt if use_main_prompt else negative_prompts[place]
    params = {
        **_main_parameters(p, seeds[place], subseeds[place]),
        **_option_parameters(p),
        **_extra_parameters(p, place, prompt=prompt, negative_prompt=negative_prompt, all_seeds=seeds, iteration=iteration),
        **_closing_parameters(p),
    }
    return build_infotext(prompt, negative_prompt, params)


def _main_parameters(p: StableDiffusionProcessing, seed: int, subseed: int) -> dict[str, Any]:
    varied, resized = p.subseed_strength != 0, p.seed_resize_from_w > 0 and p.seed_resize_from_h > 0
    return {
        "Steps": p.steps,
        "Sampler": p.sampler_name,
        "Schedule type": p.scheduler,
        "CFG scale": _short(p.cfg_scale),
        "Distilled CFG Scale": _short(p.distilled_cfg_scale) if takes_distilled_guidance(p.sd_model) else None,
        "Image CFG scale": getattr(p, "image_cfg_scale", None),
        "Seed": seed,
        "Face restoration": p.options.face_restoration_model if p.restore_faces else None,
        "Size": f"{p.width}x{p.height}",
        "Model hash": p.sd_model_hash if p.options.add_model_hash_to_info else None,
        "Model": p.sd_model_name if p.options.add_model_name_to_info else None,
        "Variation seed": subseed if varied else None,
        "Variation seed strength": p.subseed_strength if varied else None,
        "Seed resize from": f"{p.seed_resize_from_w}x{p.seed_resize_from_h}" if resized else None,
        "Denoising strength": p.extra_generation_params.get("Denoising strength"),
        "Conditional mask weight": p.inpainting_mask_weight if p.is_using_inpainting_conditioning else None,
    }


def _short(number: float) -> float:
    """7 for 7.0, as it is displayed and pasted."""
    return int(number) if float(number).is_integer() else number


def _option_parameters(p: StableDiffusionProcessing) -> dict[str, Any]:
    clip_skip = int(p.options.CLIP_stop_at_last_layers)
    return {
        "Clip skip": clip_skip if clip_skip > 1 else None,
        "ENSD": p.options.eta_noise_seed_delta if p.uses_ensd and p.options.eta_noise_seed_delta else None,
        "Token merging ratio": p.get_token_merging_ratio() or None,
        "Token merging ratio hr": (p.get_token_merging_ratio(for_hr=True) or None) if getattr(p, "enable_hr", False) else None,
        "Init image hash": getattr(p, "init_img_hash", None),
        "RNG": p.options.randn_source if p.options.randn_source != "GPU" else None,
        "Tiling": True if p.tiling else None,
    }


def _extra_parameters(p: StableDiffusionProcessing, place: int, **context: Any) -> dict[str, Any]:
    values = {}
    for key, value in p.extra_generation_params.items():
        if isinstance(value, list):
            values[key] = value[place] if place < len(value) else None
        elif callable(value):
            values[key] = value(p=p, index=place, **context)
        else:
            values[key] = value
    return {key: value for key, value in values.items() if value is not None and value != ""}


def _closing_parameters(p: StableDiffusionProcessing) -> dict[str, Any]:
    low_bits = p.options.forge_unet_storage_dtype
    modules = {f"Module {number}": name for number, name in enumerate(p.additional_module_names, start=1)}
    return {
        "Version": program_version() if p.options.add_version_to_infotext else None,
        "User": p.user if p.options.add_user_name_to_info else None,
        "Diffusion in Low Bits": low_bits if low_bits != "Automatic" else None,
        **(modules if p.options.add_vae_name_to_info else {}),
    }
