"""The img2img handler and img2img over a folder of pictures, under the names and with the argument order that extensions use."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, UnidentifiedImageError

from backend.model_folders import find_files
from modules.errors import RequestError
from modules.infotext.parameters import create_override_settings_dict, parse_generation_parameters
from modules.jobs.txt2img import Outputs, handler_outputs
from modules.pictures.metadata import read_info_from_image
from modules.pictures.resizing import fix_image
from modules.processing import Processed, StableDiffusionProcessingImg2Img
from modules.processing.chosen_script import process_with_scripts
from modules.processing.constants import opt_f
from modules.scripts import callbacks as script_callbacks

log = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".gif", ".tif", ".tiff")

# infotext key -> field of the request, for "use the parameters of each picture"
_FIELDS_FROM_INFOTEXT = {
    "Prompt": "prompt",
    "Negative prompt": "negative_prompt",
    "Seed": "seed",
    "CFG scale": "cfg_scale",
    "Sampler": "sampler_name",
    "Steps": "steps",
}
BATCH_PARAMETERS = (*_FIELDS_FROM_INFOTEXT, "Model hash")
"""What can be taken from the parameters of each picture."""
_TYPES = {"seed": int, "steps": int, "cfg_scale": float}

# positional arguments of `img2img` after id_task and request; those after the last belong to scripts
ARGUMENTS = (
    *("mode", "prompt", "negative_prompt", "styles", "init_img", "sketch", "sketch_fg", "init_img_with_mask", "init_img_with_mask_fg"),
    *("inpaint_color_sketch", "inpaint_color_sketch_fg", "init_img_inpaint", "init_mask_inpaint", "mask_blur", "mask_alpha", "inpainting_fill"),
    *("n_iter", "batch_size", "cfg_scale", "distilled_cfg_scale", "image_cfg_scale", "denoising_strength", "selected_scale_tab", "height", "width"),
    *("scale_by", "resize_mode", "inpaint_full_res", "inpaint_full_res_padding", "inpainting_mask_invert", "batch_input_dir", "batch_output_dir"),
    *("batch_inpaint_mask_dir", "override_settings_texts", "batch_use_png_info", "batch_png_info_props", "batch_png_info_dir"),
    *("batch_source_type", "batch_upload"),
)
_OF_THE_REQUEST = (
    *("prompt", "negative_prompt", "styles", "n_iter", "batch_size", "cfg_scale", "distilled_cfg_scale", "denoising_strength", "height", "width"),
    *("resize_mode", "inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding", "inpainting_mask_invert", "mask_blur"),
)
_BATCH_MODE = 5


def img2img(id_task: str, request: Any, *args: Any) -> Outputs:
    """Queue the request and wait for it. Returns the pictures, their info as JSON, and parameters and comments as HTML.

    `mode`: 0 img2img, 1 sketch, 2 inpaint, 3 inpaint sketch, 4 inpaint upload, 5 batch. Raises RequestError without a picture.
    """
    values = dict(zip(ARGUMENTS, args))
    p = img2img_create_processing(request, values, tuple(args[len(ARGUMENTS) :]))

    def run() -> Processed:
        made = _run_batch(p, values) if int(values.get("mode") or 0) == _BATCH_MODE else process_with_scripts(p)
        return made if made is not None else Processed(p, [])

    return handler_outputs(p.context.jobs.run_and_wait(id_task or None, "img2img", run, request=p))


def img2img_create_processing(request: Any, values: dict[str, Any], script_args: tuple[Any, ...]) -> StableDiffusionProcessingImg2Img:
    """The request built from the handler's arguments by name. Raises RequestError without a picture."""
    picture, mask = _picture_and_mask(values)
    fields = {name: values[name] for name in _OF_THE_REQUEST if values.get(name) is not None}
    overrides = create_override_settings_dict(values.get("override_settings_texts") or [])
    p = StableDiffusionProcessingImg2Img(**fields, init_images=[picture], mask=mask, override_settings=overrides)
    if int(values.get("selected_scale_tab") or 0) == 1 and picture is not None:
        p.width, p.height = (max(int(side * float(values["scale_by"])) // opt_f, 1) * opt_f for side in picture.size)
    p.script_args, p.user = script_args, getattr(request, "username", None)
    return p


def _picture_and_mask(values: dict[str, Any]) -> tuple[Image.Image | None, Image.Image | None]:
    """What the chosen inner tab holds; both None for a batch. Raises RequestError."""
    mode = int(values.get("mode") or 0)
    names = {0: ("init_img", None), 1: ("sketch", "sketch_fg"), 2: ("init_img_with_mask", "init_img_with_mask_fg")}
    names |= {3: ("inpaint_color_sketch", "inpaint_color_sketch_fg"), 4: ("init_img_inpaint", "init_mask_inpaint")}
    if mode == _BATCH_MODE:
        return None, None
    if mode not in names or values.get(names[mode][0]) is None:
        raise RequestError(f"img2img: mode {mode} has no picture. Modes are 0 to {_BATCH_MODE}; send the picture that belongs to the mode.")
    picture, painted = fix_image(values[names[mode][0]]), values.get(names[mode][1] or "")
    if mode == 4 or painted is None or picture is None:
        return picture, painted
    mask = painted.convert("RGBA").getchannel("A") if mode in (2, 3) else None
    if mode == 3 and mask is not None:
        mask = ImageChops.lighter(mask, mask.point(lambda value: 255 if value else 0))
    if mode in (1, 3):
        picture = Image.alpha_composite(picture.convert("RGBA"), painted.convert("RGBA").resize(picture.size))
    return picture, mask


def _run_batch(p: StableDiffusionProcessingImg2Img, values: dict[str, Any]) -> Processed | None:
    source = values.get("batch_upload") if values.get("batch_source_type") == "upload" else str(values.get("batch_input_dir") or "")
    return process_batch(
        p,
        source or "",
        str(values.get("batch_output_dir") or ""),
        str(values.get("batch_inpaint_mask_dir") or ""),
        p.script_args,
        to_scale=int(values.get("selected_scale_tab") or 0) == 1,
        scale_by=float(values.get("scale_by") or 1),
        use_png_info=bool(values.get("batch_use_png_info")),
        png_info_props=values.get("batch_png_info_props"),
        png_info_dir=values.get("batch_png_info_dir"),
    )


def process_batch(
    p: StableDiffusionProcessingImg2Img,
    input: str | Sequence[Any],
    output_dir: str,
    inpaint_mask_dir: str,
    args: Any = None,
    to_scale: bool = False,
    scale_by: float = 1.0,
    use_png_info: bool = False,
    png_info_props: Sequence[str] | None = None,
    png_info_dir: str | None = None,
) -> Processed | None:
    """Make a picture from each picture in `input`, a folder or a list of files; returns the combined results.

    `output_dir`: folder for results, empty for the default. `inpaint_mask_dir`: masks named like the pictures, or one mask for all.
    `png_info_props`: infotext keys to take from each picture, or from its namesake in `png_info_dir`. Unreadable pictures are skipped and logged.
    Raises RequestError if there are no pictures. Returns None if nothing was made."""
    paths = _pictures(input)
    state, limit = p.context.state, int(p.options.img2img_batch_show_results_limit)
    masks = find_files(Path(inpaint_mask_dir), PICTURE_SUFFIXES) if inpaint_mask_dir else []
    state.job_count = len(paths) * p.n_iter
    result: Processed | None = None
    for number, path in enumerate(paths, start=1):
        if state.interrupted or state.stopping_generation:
            break
        state.job = f"{number} out of {len(paths)}"
        one = _request_for(p, path, masks, output_dir, scale_by if to_scale else None)
        if one is None:
            continue
        if use_png_info:
            _take_parameters(one, Path(png_info_dir) / path.name if png_info_dir else path, png_info_props or ())
        result = _joined(result, process_with_scripts(one), limit)
    return result


def _pictures(given: str | Sequence[Any]) -> list[Path]:
    if isinstance(given, str):
        paths = find_files(Path(given), PICTURE_SUFFIXES) if given else []
    else:
        paths = [Path(getattr(file, "name", file)) for file in given]
    if not paths:
        raise RequestError(f"img2img batch: there are no pictures in {given!r}. Supported formats: {', '.join(PICTURE_SUFFIXES)}.")
    return paths


def _read(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            image.load()
            return fix_image(image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        log.warning("img2img batch: %s cannot be read (%s); it is skipped.", path, error)
        return None


def _request_for(
    p: StableDiffusionProcessingImg2Img, path: Path, masks: Sequence[Path], output_dir: str, scale_by: float | None
) -> StableDiffusionProcessingImg2Img | None:
    """The request for one picture of the folder; None if it cannot be read."""
    picture = _read(path)
    if picture is None:
        return None
    one = copy.copy(p)
    for name in ("extra_generation_params", "override_settings", "comments"):
        setattr(one, name, dict(getattr(p, name)))
    one.extra_result_images, one.mask, one.color_corrections, one.overlay_images, one.paste_to = [], None, None, None, None
    one.init_images = [picture] * p.batch_size
    if scale_by is not None:
        one.width, one.height = (max(int(side * scale_by) // opt_f, 1) * opt_f for side in picture.size)
    if masks:
        one.image_mask = _read(_mask_for(path, masks))
    if output_dir:
        one.outpath_samples = output_dir
        one.override_settings.setdefault("save_to_dirs", False)
        one.override_settings.setdefault("save_images_replace_action", "Add number suffix")
        if p.options.img2img_batch_use_original_name:
            several = p.n_iter > 1 or p.batch_size > 1
            one.override_settings["samples_filename_pattern"] = f"{path.stem}-[generation_number]" if several else path.stem
    return one


def _mask_for(path: Path, masks: Sequence[Path]) -> Path:
    """The mask named like the picture, else the first mask."""
    return next((mask for mask in masks if mask.stem == path.stem), masks[0])


def _take_parameters(p: StableDiffusionProcessingImg2Img, path: Path, keys: Iterable[str]) -> None:
    """Apply parameters from the infotext in the file `path`; a missing file or infotext changes nothing."""
    try:
        with Image.open(path) as image:
            text, _ = read_info_from_image(image)
    except OSError as error:
        log.warning("img2img batch: %s has no parameters (%s).", path, error)
        return
    params = parse_generation_parameters(text) if text else {}
    if text:
        script_callbacks.infotext_pasted_callback(text, params)
    if "Model hash" in keys and params.get("Model hash"):
        p.override_settings["sd_model_checkpoint"] = params["Model hash"]
    for key in keys:
        field = _FIELDS_FROM_INFOTEXT.get(key)
        if field is not None and params.get(key) not in (None, ""):
            value = params[key]
            given = f"{getattr(p, field)} {value}".strip() if field.endswith("prompt") else _TYPES.get(field, str)(value)
            setattr(p, field, given)


def _joined(all_before: Processed | None, new: Processed, limit: int) -> Processed:
    """Combined results. Only `limit` pictures are shown (-1 shows all); all are saved."""
    if all_before is None:
        return new
    room = len(new.images) if limit < 0 else max(limit - len(all_before.images), 0)
    all_before.images += new.images[:room]
    all_before.infotexts += new.infotexts[:room]
    return all_before
