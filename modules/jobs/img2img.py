"""img2img over a folder of pictures, under the name that extensions call. One request is reused for every picture."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from backend.model_folders import find_files
from modules.errors import RequestError
from modules.infotext.parameters import parse_generation_parameters
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
