"""POST txt2img and img2img: turns a client's body into a job, and the result into an answer.

Client mistakes are detected before the job is queued whenever possible. modules.processing makes the pictures; this file must not know
how.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import HTTPException
from PIL import Image

from backend.foreign_json import parse_resolution
from modules.api import models
from modules.api.infotext import apply_infotext
from modules.api.limits import MAX_BATCH_PX, MAX_PICTURE_PX, MAX_PICTURES, SIDE_MULTIPLE_PX
from modules.api.pictures import decode_picture, encode_picture, encode_settings, fetch_rules, infotext_of
from modules.api.pools import decoders, pool_for, run_in
from modules.api.script_args import build_script_args, find_runner
from modules.api.settings import check_settings, find_checkpoint
from modules.api.waiting import current_request, wait_for_job
from modules.errors import RequestError
from modules.http_edge.passwords import basic_credentials
from modules.processing import StableDiffusionProcessingImg2Img, StableDiffusionProcessingTxt2Img, process_images
from modules.processing.chosen_script import process_with_scripts

if TYPE_CHECKING:
    from modules.application import Application
    from modules.processing.request import StableDiffusionProcessing
    from modules.processing.result import Processed

log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=models.GenerationRequest)
Process = Callable[[Any], Any]

_SMALL_MODEL_PX = 512

# body fields that are not fields of the processing request
_NOT_PASSED_ON = frozenset(
    {
        *("sampler_index", "script_name", "script_args", "send_images", "save_images", "alwayson_scripts", "infotext", "include_init_images"),
        *("comments", "force_task_id"),
    }
)
_PICTURE_FIELDS = ("firstpass_image", "mask", "latent_mask")


class GenerationRoutes:
    """The two handlers. `process` runs a request; tests replace it."""

    def __init__(self, app: Application, process: Process = process_images) -> None:
        self.app = app
        self.process = process

    async def txt2img(self, body: models.StableDiffusionProcessingTxt2Img) -> models.TextToImageResponse:
        """Pictures from a prompt."""
        p, parameters, processed = await self._carry_out("txt2img", body)
        return models.TextToImageResponse(**await run_in(decoders(), self._answer, p, body, parameters, processed))

    async def img2img(self, body: models.StableDiffusionProcessingImg2Img) -> models.ImageToImageResponse:
        """Pictures from pictures."""
        if not body.init_images:
            raise HTTPException(404, "Init image not found: send the pictures to start from in init_images, as base64.")
        p, parameters, processed = await self._carry_out("img2img", body)
        return models.ImageToImageResponse(**await run_in(decoders(), self._answer, p, body, parameters, processed))

    async def _carry_out(self, tab: str, body: models.GenerationRequest) -> tuple[StableDiffusionProcessing, dict[str, Any], Processed]:
        self.app.jobs.check_room()
        p, parameters = await run_in(pool_for(body), self._prepare, tab, body)
        label = "" if self.app.config.api_auth else str(p.prompt)  # who opens the page need not know the API's password
        job = self.app.jobs.submit(body.force_task_id, tab, lambda: self._run(p), request=p, label=label)
        saves = body.save_images or p.selected_script is not None  # a selected script may save its results
        return p, parameters, await wait_for_job(job, drop_from=None if saves else self.app.jobs)

    # Before the job

    def _prepare(self, tab: str, body: models.GenerationRequest) -> tuple[StableDiffusionProcessing, dict[str, Any]]:
        """(the request to run, the effective body). Raises RequestError."""
        body, comments = apply_infotext(self.app, tab, body)
        overrides = check_settings(self.app, body.override_settings or {})
        body = self._with_native_size(body, overrides)
        check_amount(body)
        fields = body.model_dump(exclude=set(_NOT_PASSED_ON))
        fields["width"], fields["height"] = body.width, body.height
        fields["override_settings"] = overrides
        fields.update(self._named_choices(body))
        fields.update(self._pictures(body))
        fields["do_not_save_samples"] = fields["do_not_save_grid"] = not body.save_images
        if isinstance(body, models.StableDiffusionProcessingTxt2Img) and "hr_cfg" not in body.model_fields_set:
            fields["hr_cfg"] = body.cfg_scale
        runner = find_runner(self.app, tab)
        selected, script_args = build_script_args(
            runner, script_name=body.script_name, script_args=body.script_args, alwayson_scripts=body.alwayson_scripts
        )
        p = _REQUEST_CLASSES[tab](**fields)
        p.is_api, p.user = True, self._user()
        for comment in comments:
            p.comment(comment)
        p.scripts, p.script_args = runner, tuple(script_args)
        p.selected_script = selected
        return p, self._echo(body)

    def _user(self) -> str | None:
        """Who asks, if the API has a password, which has been checked already."""
        request = current_request.get()
        given = basic_credentials(request.headers.get("authorization")) if request is not None and self.app.config.api_auth else None
        return given[0] if given else None

    def _with_native_size(self, body: RequestT, overrides: Mapping[str, Any]) -> RequestT:
        """Round sides down to whole latents. A request without a size gets a small model's native size instead of 512."""
        native = self._native_size_px(overrides)
        sized = bool({"width", "height"} & body.model_fields_set)
        width, height = (body.width, body.height) if sized or native is None else native
        cut = {name: side // SIDE_MULTIPLE_PX * SIDE_MULTIPLE_PX for name, side in (("width", width), ("height", height))}
        return body.model_copy(update=cut)

    def _native_size_px(self, overrides: Mapping[str, Any]) -> tuple[int, int] | None:
        """The size declared in the checkpoint's file, if both sides are below 512. Raises NoCheckpointError."""
        checkpoint = self.app.models.resolve(self.app.options.snapshot(overrides)).checkpoint
        sides = parse_resolution(checkpoint.metadata.get("modelspec.resolution"))
        if sides is None:
            return None
        width, height = sides
        return (width, height) if SIDE_MULTIPLE_PX <= width < _SMALL_MODEL_PX and SIDE_MULTIPLE_PX <= height < _SMALL_MODEL_PX else None

    def _named_choices(self, body: models.GenerationRequest) -> dict[str, Any]:
        """Sampler, schedule and upscaler by their proper names. Raises RequestError."""
        from modules.samplers import registry  # imports torch; server startup does not wait for it

        sampler, scheduler = registry.get_sampler_and_scheduler(body.sampler_name or body.sampler_index, body.scheduler)
        if isinstance(body, models.StableDiffusionProcessingTxt2Img) and body.enable_hr:
            _check_hires(self.app, body)
        if body.refiner_checkpoint not in (None, "", "None", "none"):
            find_checkpoint(self.app, body.refiner_checkpoint)
        return {"sampler_name": sampler, "scheduler": scheduler}

    def _pictures(self, body: models.GenerationRequest) -> dict[str, Any]:
        """All pictures of the body, decoded; the mask resized to its picture. Raises PictureError, FetchError."""
        rules = fetch_rules(self.app.options)
        decoded: dict[str, Any] = {}
        for name in _PICTURE_FIELDS:
            text = getattr(body, name, None)
            if name in type(body).model_fields:
                decoded[name] = decode_picture(text, name, rules=rules) if text else None
        if isinstance(body, models.StableDiffusionProcessingImg2Img):
            texts = body.init_images or []
            pictures = [decode_picture(text, f"init_images[{index}]", rules=rules) for index, text in enumerate(texts)]
            decoded["init_images"] = pictures
            decoded["mask"] = _fit_mask(decoded["mask"], pictures[0])
        return decoded

    def _echo(self, body: models.GenerationRequest) -> dict[str, Any]:
        """`parameters` of the answer: the effective body, without its pictures unless requested."""
        echo = body.model_dump()
        if isinstance(body, models.StableDiffusionProcessingImg2Img) and not body.include_init_images:
            echo["init_images"] = echo["mask"] = None
        return echo

    # The job and its result

    def _run(self, p: Any) -> Any:
        return process_with_scripts(p, self.process)

    def _answer(self, p: Any, body: models.GenerationRequest, parameters: dict[str, Any], processed: Any) -> dict[str, Any]:
        options = p.options
        settings = encode_settings(options)
        pictures = [*processed.images, *processed.extra_images] if body.send_images else []
        infotexts = [*processed.infotexts]
        encoded = [
            encode_picture(
                picture,
                extension=options.samples_format,
                infotext=infotexts[index] if index < len(processed.images) and index < len(infotexts) else infotext_of(picture),
                settings=settings,
            )
            for index, picture in enumerate(pictures)
            if isinstance(picture, Image.Image)
        ]
        return {"images": encoded, "parameters": parameters, "info": processed.js()}


_REQUEST_CLASSES: dict[str, Any] = {"txt2img": StableDiffusionProcessingTxt2Img, "img2img": StableDiffusionProcessingImg2Img}


def check_amount(body: models.GenerationRequest) -> None:
    """Raises RequestError if the number or size of pictures exceeds the limit for one request."""
    if body.width * body.height > MAX_PICTURE_PX:
        raise RequestError(f"width x height: {body.width}x{body.height} px is too large; the limit is {MAX_PICTURE_PX / 10**6:.1f} megapixels.")
    if body.width * body.height * body.batch_size > MAX_BATCH_PX:
        raise RequestError(
            f"batch_size: {body.batch_size} pictures of {body.width}x{body.height} px at once is too much; the limit is "
            f"{MAX_BATCH_PX / 10**6:.0f} megapixels per batch. Use n_iter for more batches."
        )
    if body.batch_size * body.n_iter > MAX_PICTURES:
        raise RequestError(
            f"batch_size x n_iter: {body.batch_size * body.n_iter} pictures are too many for one request; the limit is {MAX_PICTURES}."
        )


def _check_hires(app: Application, body: models.StableDiffusionProcessingTxt2Img) -> None:
    """Raises RequestError for an impossible second pass: no scale, too large, or unknown names."""
    from modules.pictures.upscaler import find_upscaler
    from modules.pictures.upscaler_list import available_upscalers
    from modules.processing import LATENT_UPSCALE_MODES

    width, height = (body.hr_resize_x, body.hr_resize_y) if body.hr_resize_x or body.hr_resize_y else (0, 0)
    if not (width or height):
        if body.hr_scale <= 0:
            raise RequestError("hr_scale: enable_hr needs a scale above 0, or hr_resize_x and hr_resize_y.")
        width, height = int(body.width * body.hr_scale), int(body.height * body.hr_scale)
    width, height = width or height * body.width // body.height, height or width * body.height // body.width
    if width * height > MAX_PICTURE_PX:
        raise RequestError(f"hires pass: {width}x{height} px is too large; the limit is {MAX_PICTURE_PX / 10**6:.1f} megapixels.")
    if body.hr_upscaler and body.hr_upscaler not in LATENT_UPSCALE_MODES:
        find_upscaler(body.hr_upscaler, available_upscalers())
    if body.hr_checkpoint_name not in (None, "", "Use same checkpoint"):
        find_checkpoint(app, body.hr_checkpoint_name)


def _fit_mask(mask: Image.Image | None, picture: Image.Image) -> Image.Image | None:
    if mask is None or mask.size == picture.size:
        return mask
    log.info("img2img: the mask is %dx%d px, the picture %dx%d; the mask is stretched to match.", *mask.size, *picture.size)
    return mask.resize(picture.size, Image.Resampling.LANCZOS if mask.mode not in ("1", "P") else Image.Resampling.NEAREST)
