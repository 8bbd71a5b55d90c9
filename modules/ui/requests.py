"""Builds requests from a tab's control values. The only page module that knows the request classes.

Must not know gradio components; `values` maps the names of a tab's inputs to the user's values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageChops

from modules.errors import RequestError
from modules.infotext import parameters
from modules.jobs.img2img import process_batch
from modules.pictures.resizing import fix_image
from modules.processing import Processed, StableDiffusionProcessingImg2Img, StableDiffusionProcessingTxt2Img
from modules.processing.chosen_script import process_with_scripts
from modules.processing.compositing import create_binary_mask
from modules.ui.page_files import picture_of_page
from modules.ui.scripts import arguments_from
from modules.ui.sections import USE_SAME_CHOICES
from modules.ui.shown_text import infotext_of, picture_at

if TYPE_CHECKING:
    from modules.application import Application

COMMON_NAMES = (
    "prompt",
    "negative_prompt",
    "n_iter",
    "batch_size",
    "cfg_scale",
    "distilled_cfg_scale",
    "height",
    "width",
    "steps",
    "sampler_name",
    "scheduler",
)
INPAINT_NAMES = ("mask_blur", "inpainting_mask_invert", "inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding")
MODE_IMG2IMG, MODE_SKETCH, MODE_INPAINT, MODE_INPAINT_SKETCH, MODE_INPAINT_UPLOAD, MODE_BATCH = range(6)
"""Numbers of the img2img tab's inner tabs."""
MODES_WITH_MASK = frozenset({MODE_INPAINT, MODE_INPAINT_SKETCH, MODE_INPAINT_UPLOAD})


def build_txt2img(app: Application, values: Mapping[str, Any]) -> StableDiffusionProcessingTxt2Img:
    """The request of the txt2img tab. Without hires fix, its fields keep their defaults."""
    fields = {**_common_fields(values), "enable_hr": bool(values["enable_hr"])}
    if fields["enable_hr"]:
        fields.update({name: value for name, value in values.items() if name.startswith("hr_")}, denoising_strength=values["denoising_strength"])
        fields["hr_additional_modules"] = values["hr_additional_modules"] or [USE_SAME_CHOICES]
    options = app.options
    request = StableDiffusionProcessingTxt2Img(
        outpath_samples=options.outdir_samples or options.outdir_txt2img_samples,
        outpath_grids=options.outdir_grids or options.outdir_txt2img_grids,
        **fields,
    )
    _give_scripts(app, request, "txt2img", values)
    return request


def _give_scripts(app: Application, request: Any, tab: str, values: Mapping[str, Any]) -> None:
    """Attach the tab's scripts with their control values."""
    arguments = arguments_from(values)
    if arguments and tab in app.script_runners:
        request.scripts, request.script_args = app.script_runners[tab], arguments


def build_upscale(app: Application, values: Mapping[str, Any]) -> StableDiffusionProcessingTxt2Img:
    """The request that repeats the selected gallery picture with hires fix: the picture's prompt and seed, the tab's hires settings.

    `values` are those of the txt2img tab plus picture_index, gallery and generation_info. Raises RequestError without a picture of this page."""
    file = picture_at(values["gallery"], values["picture_index"])
    if file is None:
        raise RequestError("There is no picture to upscale yet: generate one, then select it.")
    params = parameters.parse_generation_parameters(infotext_of(values["generation_info"], int(values["picture_index"])))
    request = build_txt2img(app, {**values, "enable_hr": True, "n_iter": 1, "batch_size": 1, "styles": []})
    request.txt2img_upscale = True
    with Image.open(picture_of_page(file, app.config.outputs_dir)) as picture:
        request.firstpass_image = picture.copy()
    request.width, request.height = request.firstpass_image.size
    request.prompt, request.negative_prompt = params.get("Prompt", request.prompt), params.get("Negative prompt", request.negative_prompt)
    request.seed, request.subseed = int(params.get("Seed", request.seed)), int(params.get("Variation seed", -1))
    return request


def build_img2img(app: Application, values: Mapping[str, Any]) -> StableDiffusionProcessingImg2Img | Img2imgBatch:
    """The request of the img2img tab. Raises RequestError if the picture or the mask is missing."""
    if int(values["mode"]) == MODE_BATCH:
        return _build_batch(app, values)
    image, mask = source_and_mask(values)
    fields = _common_fields(values)
    if values["selected_scale_tab"] == 1:
        fields["width"], fields["height"] = scaled_size(image.size, values["scale_by"])
    if mask is not None:
        fields.update({name: values[name] for name in INPAINT_NAMES}, mask=mask)
    return _img2img_request(app, values, init_images=[image], **fields)


def _img2img_request(app: Application, values: Mapping[str, Any], **fields: Any) -> StableDiffusionProcessingImg2Img:
    options = app.options
    request = StableDiffusionProcessingImg2Img(
        outpath_samples=options.outdir_samples or options.outdir_img2img_samples,
        outpath_grids=options.outdir_grids or options.outdir_img2img_grids,
        resize_mode=values["resize_mode"],
        denoising_strength=values["denoising_strength"],
        **fields,
    )
    _give_scripts(app, request, "img2img", values)
    return request


@dataclass(frozen=True, kw_only=True)
class Img2imgBatch:
    """A request that runs once for each of several pictures; `arguments` are for process_batch."""

    request: StableDiffusionProcessingImg2Img
    arguments: Mapping[str, Any]

    def run(self) -> Processed:
        """Runs on the job's thread. The result has no picture if interrupted before the first one."""
        processed = process_batch(self.request, **self.arguments)
        return Processed(self.request, [], self.request.seed) if processed is None else processed


def _build_batch(app: Application, values: Mapping[str, Any]) -> Img2imgBatch:
    """Raises RequestError if no picture was given."""
    is_folder = int(values["batch_kind"]) == 1
    if is_folder and app.config.hide_ui_dir_config:
        raise RequestError("Server folders cannot be used: the server was started with --hide-ui-dir-config. Upload the pictures instead.")
    source = (values["batch_input_dir"] or "").strip() if is_folder else list(values["batch_files"] or [])
    if not source:
        raise RequestError("Batch needs pictures: name an input directory." if is_folder else "Batch needs pictures: upload some.")
    request = _img2img_request(app, values, **_common_fields(values), **{name: values[name] for name in INPAINT_NAMES})
    folders = {name: (values[f"batch_{name}"] or "").strip() if is_folder else "" for name in ("output_dir", "mask_dir", "png_info_dir")}
    app.folders.check_batch_folder("Input directory", source if isinstance(source, str) else "")
    app.folders.check_batch_folder("Output directory", folders["output_dir"], is_written=True)
    for name in ("mask_dir", "png_info_dir"):
        app.folders.check_batch_folder({"mask_dir": "Mask directory"}.get(name, "PNG info directory"), folders[name])
    arguments = {
        "input": source,
        "output_dir": folders["output_dir"],
        "inpaint_mask_dir": folders["mask_dir"],
        "to_scale": values["selected_scale_tab"] == 1,
        "scale_by": values["scale_by"],
        "use_png_info": bool(values["batch_use_png_info"]),
        "png_info_props": list(values["batch_png_info_props"] or []),
        "png_info_dir": folders["png_info_dir"] or None,
    }
    return Img2imgBatch(request=request, arguments=arguments)


def carry_out(request: Any) -> Processed:
    """Make the pictures of a request built by one of these functions. Runs on the job's thread."""
    return request.run() if isinstance(request, Img2imgBatch) else process_with_scripts(request)


def scaled_size(size_px: tuple[int, int], scale: float) -> tuple[int, int]:
    """`size_px` times `scale`, each side rounded down to a multiple of 8 and at least 8."""
    width, height = (max(8, int(side * scale) // 8 * 8) for side in size_px)
    return width, height


def source_and_mask(values: Mapping[str, Any]) -> tuple[Image.Image, Image.Image | None]:
    """The start picture and, in the inpaint modes, the mask (white is repainted). Raises RequestError if one is missing."""
    mode = int(values["mode"])
    if mode == MODE_SKETCH:
        sketch = flat_sketch(values["sketch"])
        if sketch is None:
            raise RequestError("Sketch needs a picture to start from: put one into the field above, or paint one.")
        return sketch, None
    if mode in (MODE_INPAINT, MODE_INPAINT_SKETCH):
        editor = values["inpaint_editor" if mode == MODE_INPAINT else "inpaint_sketch"]
        picture, mask = _painted_picture(editor)
        return (picture if mode == MODE_INPAINT else flat_sketch(editor) or picture), mask
    if mode == MODE_INPAINT_UPLOAD:
        picture, mask = values["inpaint_upload_image"], values["inpaint_upload_mask"]
        if picture is None or mask is None:
            raise RequestError("Inpaint upload needs a picture and a mask of it: put both into the two fields above.")
        return upright(picture), mask_from_upload(mask)
    if values["init_image"] is None:
        raise RequestError("img2img needs a picture to start from: put one into the field above.")
    return upright(values["init_image"]), None


def _painted_picture(editor: Mapping[str, Any] | None) -> tuple[Image.Image, Image.Image]:
    picture = editor.get("background") if editor else None
    if editor is None or picture is None:
        raise RequestError("Inpaint needs a picture to start from: put one into the field above.")
    mask = mask_from_layers(editor.get("layers") or [], picture.size)
    if mask.getbbox() is None:
        raise RequestError("Nothing is masked: paint over the part of the picture to repaint.")
    return upright(picture), mask


def flat_sketch(editor: Mapping[str, Any] | None) -> Image.Image | None:
    """An editor's picture with the paint on top; paint without a picture is put on white. None if there is neither."""
    background = editor.get("background") if editor else None
    layers = [layer.convert("RGBA") for layer in (editor.get("layers") or [] if editor else [])]
    painted = [layer for layer in layers if layer.getchannel("A").getbbox() is not None]
    if background is None and not painted:
        return None
    flat = Image.new("RGBA", painted[0].size, "#ffffff") if background is None else background.convert("RGBA")
    for layer in painted:
        flat = Image.alpha_composite(flat, layer if layer.size == flat.size else layer.resize(flat.size, Image.Resampling.LANCZOS))
    return flat


def upright(image: Image.Image) -> Image.Image:
    """`image` rotated per its EXIF orientation, 8 bits per channel, RGBA."""
    fixed = fix_image(image)
    assert fixed is not None
    return fixed if fixed.mode == "RGBA" else fixed.convert("RGBA")


def mask_from_layers(layers: list[Image.Image], size_px: tuple[int, int]) -> Image.Image:
    """The paint as a mask: white where any layer has paint."""
    mask = Image.new("L", size_px, 0)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A")
        if alpha.size != size_px:
            alpha = alpha.resize(size_px, Image.Resampling.NEAREST)
        mask = ImageChops.lighter(mask, alpha)
    return mask.point([0] * 128 + [255] * 128)


def mask_from_upload(mask: Image.Image) -> Image.Image:
    """An uploaded mask as grayscale: its alpha channel, thresholded, if it has one; else its brightness."""
    fixed = fix_image(mask)
    assert fixed is not None
    return create_binary_mask(fixed)


def _common_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: values[name] for name in COMMON_NAMES}
    fields["styles"] = list(values["styles"] or [])
    fields["override_settings"] = parameters.create_override_settings_dict(values["override_settings"] or [])
    fields["seed"] = _seed(values["seed"])
    if values["enable_refiner"]:
        fields.update(refiner_checkpoint=values["refiner_checkpoint"], refiner_switch_at=values["refiner_switch_at"])
    if values["seed_enable_extras"]:
        fields["subseed"] = _seed(values["subseed"])
        fields.update({name: values[name] for name in ("subseed_strength", "seed_resize_from_w", "seed_resize_from_h")})
    return fields


def _seed(value: float | None) -> int:
    return -1 if value is None else int(value)
