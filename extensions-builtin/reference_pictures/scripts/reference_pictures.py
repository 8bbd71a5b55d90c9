"""Reference pictures: up to four pictures that an editing model (Flux.1 Kontext, Qwen-Image-Edit) reads for the picture it makes, and the picture of
edges or depth that a Flux.1 Canny or Depth model makes its picture from. The panel, and the work during a job.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from modules import scripts
from modules.api.pictures import decode_picture
from modules.errors import RequestError
from modules.pictures.resizing import CROP_AND_RESIZE, flatten, resize_by_mode, to_8_bit
from modules.processing.latents import encode_pixels, latent_format_of, pil_to_pixels
from modules.processing.model_facts import is_edit_model, most_references, reads_pictures, takes_control_picture
from modules.ui_components import InputAccordion
from modules_forge.shared import supported_preprocessors

MOST_PICTURES = 4
MOST_PIXELS = 1024 * 1024
"""Larger references are scaled down to about this: editing models were trained with pictures of a megapixel, and every token of theirs costs time."""
AUTOMATIC, YES, NO = "Automatic", "Yes", "No"
NO_PREPROCESSOR = "None"
INFOTEXT_KEY = "Reference pictures"


class ReferencePictures(scripts.Script):
    """A panel in both tabs. Arguments: on or off, whether img2img's picture is a reference, the preprocessor for edges or depth, four pictures."""

    sorting_priority = 11

    def title(self) -> str:
        return "Reference pictures"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        with InputAccordion(
            False, label="Reference pictures (Kontext, Flux.2-klein, Qwen-Image-Edit, Canny, Depth)", elem_id=self.elem_id("enabled")
        ) as enabled:
            with gr.Row():
                own = gr.Radio(
                    label="img2img's picture is the first one", choices=[AUTOMATIC, YES, NO], value=AUTOMATIC, visible=is_img2img,
                    info="Automatic: if the model is for editing, which its file name tells (kontext for Flux.1, edit for Qwen-Image).",
                    elem_id=self.elem_id("img2img"),
                )  # fmt: skip
                preprocessor = gr.Dropdown(
                    label="Preprocessor for Canny and Depth models", choices=[NO_PREPROCESSOR, *list_preprocessors()], value=NO_PREPROCESSOR,
                    elem_id=self.elem_id("preprocessor"),
                )  # fmt: skip
            with gr.Row():
                pictures = [
                    gr.Image(
                        label=f"Picture {number + 1}", type="pil", sources=["upload", "clipboard"], elem_id=self.elem_id(f"picture_{number + 1}")
                    )
                    for number in range(MOST_PICTURES)
                ]
        return [enabled, own, preprocessor, *pictures]

    # the job

    def process(self, p: Any, *args: Any) -> None:
        """Read the pictures and check that the model takes them. Raises RequestError."""
        p.reference_pictures = read_arguments(p, args)
        model = p.sd_model
        if p.reference_pictures.pictures and not (takes_control_picture(model) or most_references(model)):
            raise RequestError(
                f"Reference pictures were given, but {model.family_title} in {name_of(model)} takes none. Choose an editing model (Kontext, "
                "Flux.2-klein, Qwen-Image-Edit), a Canny or a Depth model, or turn the panel off."
            )
        if reads_pictures(model):
            p.text_pictures = text_pictures(p, p.reference_pictures)
        count = len(p.reference_pictures.pictures) + p.reference_pictures.takes_img2img_picture
        if count and not takes_control_picture(model):
            p.extra_generation_params[INFOTEXT_KEY] = count

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Give the pass its references, or its picture of edges or depth. Raises RequestError if the model needs one and there is none."""
        given: GivenPictures = p.reference_pictures
        height, width = (int(side) for side in kwargs["x"].shape[2:])
        if takes_control_picture(p.sd_model):
            latents = control_latents(p, given, height, width)
            unet = p.sd_model.forge_objects.unet.clone()
            unet.extra_concat_condition = latents.to(kwargs["x"])
        elif most_references(p.sd_model) and (references := reference_latents(p, given)):
            unet = p.sd_model.forge_objects.unet.clone()
            unet.set_reference_latents(references)
        else:
            return
        p.sd_model.forge_objects.unet = unet

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        p.reference_pictures, p.text_pictures = GivenPictures([], False, NO_PREPROCESSOR), ()


class GivenPictures:
    """A job's pictures, upright RGB, and their latents once they have been encoded."""

    def __init__(self, pictures: Sequence[Image.Image], takes_img2img_picture: bool, preprocessor: str) -> None:
        self.pictures, self.takes_img2img_picture, self.preprocessor = list(pictures), takes_img2img_picture, preprocessor
        self.latents: list[torch.Tensor] | None = None


def read_arguments(p: Any, args: Sequence[Any]) -> GivenPictures:
    """The script's arguments from the page or the API; the panel's own values if there are none. Raises RequestError."""
    enabled, own, preprocessor, *given = [*args, *[False, AUTOMATIC, NO_PREPROCESSOR][len(args) :]]
    if enabled not in (True, False, None):
        raise RequestError(f"Reference pictures: the first argument turns the panel on; send true or false, not {str(enabled)[:80]!r}.")
    if own not in (AUTOMATIC, YES, NO):
        raise RequestError(f"Reference pictures: {own!r} says whether img2img's picture is a reference; send {AUTOMATIC!r}, {YES!r} or {NO!r}.")
    if preprocessor not in (None, "", NO_PREPROCESSOR) and preprocessor not in supported_preprocessors:
        raise RequestError(f"Reference pictures: there is no preprocessor {preprocessor!r}. Known ones: {', '.join(list_preprocessors())}.")
    pictures = [read_picture(p, one, number) for number, one in enumerate(given[:MOST_PICTURES]) if enabled and not is_empty(one)]
    return GivenPictures(pictures, takes_img2img_picture(p, own if enabled else AUTOMATIC, len(pictures)), preprocessor or NO_PREPROCESSOR)


def takes_img2img_picture(p: Any, own: str, others: int) -> bool:
    """Whether img2img's picture is a reference. "Yes" needs a model that takes one, and room for one more."""
    is_img2img = bool(getattr(p, "init_images", None))
    if not is_img2img or own == NO or takes_control_picture(p.sd_model):
        return False
    if own == YES and not most_references(p.sd_model):
        raise RequestError(f"img2img's picture was to be a reference, but {name_of(p.sd_model)} takes none. Choose an editing model.")
    return (own == YES or is_edit_model(p.sd_model)) and others < MOST_PICTURES


def is_empty(given: Any) -> bool:
    return given is None or (isinstance(given, str) and not given.strip())


def read_picture(p: Any, given: Any, number: int) -> Image.Image:
    """A picture from the page (PIL), another script (an array) or the API (base64). Raises RequestError."""
    if isinstance(given, str):
        given = decode_picture(given, f"Reference picture {number + 1}")
    if isinstance(given, np.ndarray):
        given = Image.fromarray(to_8_bit(given))
    if not isinstance(given, Image.Image):
        raise RequestError(f"Reference picture {number + 1} is a {type(given).__name__}; send a picture as base64.")
    return flatten(given, p.options.img2img_background_color)


def list_preprocessors() -> list[str]:
    """Preprocessors that make edges or depth."""
    return sorted(name for name, one in supported_preprocessors.items() if {"Canny", "Depth"} & set(one.tags))


def name_of(model: Any) -> str:
    return str(model.filename).replace("\\", "/").rpartition("/")[2]


def text_pictures(p: Any, given: GivenPictures) -> tuple[np.ndarray, ...]:
    """What the text encoder sees, in the order of the references. Raises RequestError for several initial pictures: all prompts see the same ones."""
    own = list(p.init_images) if given.takes_img2img_picture else []
    if len(own) > 1:
        raise RequestError(
            f"{p.sd_model.family_title} looks at its initial picture while it reads the prompt, but {len(own)} initial pictures were sent at once. "
            "Send one at a time."
        )
    pictures = [flatten(picture, p.options.img2img_background_color) for picture in own]
    return tuple(np.asarray(picture.convert("RGB")) for picture in (*pictures, *given.pictures))


# latents


def fitting_size(width_px: int, height_px: int, step_px: int) -> tuple[int, int]:
    """The size of a reference: its own, at most about a megapixel, in whole tokens. Example: 4000x3000 -> 1184x880 in steps of 16."""
    scale = min(1.0, math.sqrt(MOST_PIXELS / (width_px * height_px)))
    return max(step_px, round(width_px * scale / step_px) * step_px), max(step_px, round(height_px * scale / step_px) * step_px)


def reference_latents(p: Any, given: GivenPictures) -> list[torch.Tensor]:
    """Latents of img2img's picture at the request's size, then those of the panel's pictures, which are encoded once a job."""
    if given.latents is None:
        format_ = latent_format_of(p.sd_model)
        step_px = format_.factor * format_.cell
        sizes = [fitting_size(*picture.size, step_px) for picture in given.pictures]
        given.latents = [
            encode_pixels(p.sd_model, pil_to_pixels([picture.resize(size, Image.Resampling.LANCZOS)])) for picture, size in zip(given.pictures, sizes)
        ]
    own = [p.init_latent] if given.takes_img2img_picture else []
    return [*own, *given.latents]


def control_latents(p: Any, given: GivenPictures, height: int, width: int) -> torch.Tensor:
    """Latents of the picture of edges or depth at the pass's size: the panel's first picture, else img2img's. Raises RequestError without either."""
    pictures = given.pictures or list(getattr(p, "init_images", None) or ())
    if not pictures:
        raise RequestError(
            f"{name_of(p.sd_model)} makes pictures from a picture of edges or depth. Open the panel Reference pictures and add one, or use img2img."
        )
    factor = latent_format_of(p.sd_model).factor
    picture = preprocess(flatten(pictures[0], p.options.img2img_background_color), given.preprocessor)
    return encode_pixels(p.sd_model, pil_to_pixels([resize_by_mode(CROP_AND_RESIZE, picture, width * factor, height * factor)]))


def preprocess(picture: Image.Image, name: str) -> Image.Image:
    """Edges or depth of a picture; the picture itself without a preprocessor. Raises RequestError for a preprocessor that returns no picture."""
    if name == NO_PREPROCESSOR:
        return picture
    found = supported_preprocessors[name](input_image=np.asarray(picture), resolution=min(picture.size), slider_1=None, slider_2=None)
    if not isinstance(found, np.ndarray):
        raise RequestError(f"Reference pictures: the preprocessor {name!r} returns no picture. Choose another one, or None.")
    return Image.fromarray(to_8_bit(found)).convert("RGB")
