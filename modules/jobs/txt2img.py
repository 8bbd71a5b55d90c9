"""The txt2img handler with the name and argument order that extensions use; runs as a job in the application's queue.

Arguments after the last named one belong to scripts.
"""

from __future__ import annotations

import html
from typing import Any

from modules.infotext.parameters import create_override_settings_dict
from modules.processing import Processed, StableDiffusionProcessingTxt2Img, process_images

# positional arguments after id_task and request
ARGUMENTS = (
    "prompt",
    "negative_prompt",
    "styles",
    "n_iter",
    "batch_size",
    "cfg_scale",
    "distilled_cfg_scale",
    "height",
    "width",
    "enable_hr",
    "denoising_strength",
    "hr_scale",
    "hr_upscaler",
    "hr_second_pass_steps",
    "hr_resize_x",
    "hr_resize_y",
    "hr_checkpoint_name",
    "hr_additional_modules",
    "hr_sampler_name",
    "hr_scheduler",
    "hr_prompt",
    "hr_negative_prompt",
    "hr_cfg",
    "hr_distilled_cfg",
    "override_settings_texts",
)

Outputs = tuple[list[Any], str, str, str]


def txt2img_create_processing(id_task: str, request: Any, *args: Any, force_enable_hr: bool = False) -> StableDiffusionProcessingTxt2Img:
    """The request built from the handler's arguments (ARGUMENTS, then script arguments)."""
    fields = dict(zip(ARGUMENTS, args))
    overrides = create_override_settings_dict(fields.pop("override_settings_texts", None) or [])
    p = StableDiffusionProcessingTxt2Img(**{**fields, "enable_hr": bool(fields.get("enable_hr")) or force_enable_hr}, override_settings=overrides)
    p.script_args = tuple(args[len(ARGUMENTS) :])
    p.user = getattr(request, "username", None)
    return p


def txt2img(id_task: str, request: Any, *args: Any) -> Outputs:
    """Queue the request and wait for it. Returns the pictures, their info as JSON, and parameters and comments as HTML."""
    p = txt2img_create_processing(id_task, request, *args)
    return handler_outputs(p.context.jobs.run_and_wait(id_task or None, "txt2img", lambda: process_images(p), request=p))


def handler_outputs(processed: Processed) -> Outputs:
    """The return values of the page's handlers."""
    return [*processed.images, *processed.extra_images], processed.js(), _paragraph(processed.info), _paragraph(processed.comments, "comments")


def _paragraph(text: str, classname: str = "") -> str:
    attribute = f" class='{classname}'" if classname else ""
    return f"<p{attribute}>{'<br>'.join(html.escape(line) for line in text.strip().splitlines())}</p>"
