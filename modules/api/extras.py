"""Routes of the Extras and PNG Info tabs: upscaling pictures, and reading their metadata."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from PIL import Image

from modules.api import models
from modules.api.limits import MAX_PICTURE_PX
from modules.api.pictures import decode_picture, encode_picture, encode_settings, fetch_rules, infotext_of, plain_items
from modules.api.pools import decoders, pool_for, run_in
from modules.api.waiting import wait_for_job
from modules.errors import RequestError
from modules.infotext import parameters as infotext_utils
from modules.pictures.metadata import read_info_from_image
from modules.pictures.postprocessing import ExtrasResult, ExtrasSettings, check_extras, goal_size_px, run_extras
from modules.pictures.upscaler_list import available_upscalers

if TYPE_CHECKING:
    from modules.application import Application


class ExtrasRoutes:
    """One method per route."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def single_image(self, body: models.ExtrasSingleImageRequest) -> models.ExtrasSingleImageResponse:
        """Upscale one picture."""
        results = await self._carry_out(body, [("image", body.image)])
        return models.ExtrasSingleImageResponse(html_info=_html_info(results), image=results[0][1])

    async def batch_images(self, body: models.ExtrasBatchImagesRequest) -> models.ExtrasBatchImagesResponse:
        """Upscale several pictures; results keep the order."""
        named = [(f"imageList[{index}].data", entry.data) for index, entry in enumerate(body.imageList)]
        if not named:
            raise RequestError("imageList: is empty; send at least one picture.")
        results = await self._carry_out(body, named)
        images = [text for _, text in results] if body.show_extras_results else []
        return models.ExtrasBatchImagesResponse(html_info=_html_info(results), images=images)

    async def _carry_out(self, body: models.ExtrasBaseRequest, named: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """(infotext, base64 picture) of each result."""
        settings = extras_settings(body)
        self.app.jobs.check_room()
        pictures = await run_in(pool_for(named), self._decode, settings, named)
        job = self.app.jobs.submit(None, "extras", lambda: self._enlarge(pictures, settings))
        results = await wait_for_job(job, drop_from=self.app.jobs)
        return await run_in(decoders(), self._encode, pictures, results)

    def _decode(self, settings: ExtrasSettings, named: list[tuple[str, str]]) -> list[Image.Image]:
        check_extras(settings, available_upscalers())
        rules = fetch_rules(self.app.options)
        pictures = [decode_picture(text, name, rules=rules) for name, text in named]
        for (name, _), picture in zip(named, pictures):
            width, height = goal_size_px(picture, settings)
            if width * height > 4 * MAX_PICTURE_PX:
                limit = f"the limit is {4 * MAX_PICTURE_PX / 10**6:.1f} megapixels"
                raise RequestError(f"{name}: the result would be {width}x{height} px; {limit}. Use a smaller factor.")
        return pictures

    def _enlarge(self, pictures: list[Image.Image], settings: ExtrasSettings) -> list[ExtrasResult]:
        results = []
        self.app.state.job_count = len(pictures)
        for picture in pictures:
            if self.app.state.interrupted:
                break
            results.append(run_extras(picture, settings, available_upscalers()))
            self.app.state.nextjob()
        if not results:
            raise RequestError("the job was interrupted before its first picture was done.")
        return results

    def _encode(self, pictures: list[Image.Image], results: list[ExtrasResult]) -> list[tuple[str, str]]:
        options = self.app.options
        settings = encode_settings(options)
        encoded = []
        for source, result in zip(pictures, results):
            infotext = ", ".join(text for text in (infotext_of(source), result.infotext) if text) or None
            encoded.append((result.infotext, encode_picture(result.image, extension=options.samples_format, infotext=infotext, settings=settings)))
        return encoded

    async def png_info(self, body: models.PNGInfoRequest) -> models.PNGInfoResponse:
        """A picture's generation parameters; empty if it has none."""
        return await run_in(pool_for(body), self._png_info, body)

    def _png_info(self, body: models.PNGInfoRequest) -> models.PNGInfoResponse:
        image = decode_picture(body.image.strip(), "image", rules=fetch_rules(self.app.options))
        geninfo, items = read_info_from_image(image)
        parameters = infotext_utils.parse_generation_parameters(geninfo) if geninfo else {}
        return models.PNGInfoResponse(info=geninfo or "", items=plain_items(items), parameters=parameters)


class NotAvailableError(RequestError):
    """A route that clients know, for a feature this program lacks."""

    status = 501


def interrogate(body: models.InterrogateRequest) -> None:
    """Raises NotAvailableError: there is no captioning model."""
    raise NotAvailableError("captioning (interrogate) is not available: this program includes no model for it.")


def extras_settings(body: models.ExtrasBaseRequest) -> ExtrasSettings:
    """The body converted to the settings of the Extras tab."""
    return ExtrasSettings(
        mode=body.resize_mode,
        factor=body.upscaling_resize,
        size_px=(body.upscaling_resize_w, body.upscaling_resize_h),
        crop=body.upscaling_crop,
        first=body.upscaler_1,
        second=body.upscaler_2,
        second_visibility=body.extras_upscaler_2_visibility,
        face_restoration_visibility=max(body.gfpgan_visibility, body.codeformer_visibility),
    )


def _html_info(results: list[tuple[str, str]]) -> str:
    texts = dict.fromkeys(infotext for infotext, _ in results if infotext)
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)
