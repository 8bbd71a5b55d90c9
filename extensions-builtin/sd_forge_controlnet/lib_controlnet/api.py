"""ControlNet's API routes: lists, and running a preprocessor on a picture."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel, Field

from lib_controlnet import external_code, global_state
from modules.api.limits import MAX_INPUT_PICTURES
from modules.api.pictures import decode_picture, fetch_rules
from modules.api.pools import pool_for, run_in
from modules.api.routes import RoutePolicy, create_router
from modules.api.waiting import wait_for_job
from modules.application import current_application
from modules.errors import RequestError
from modules_forge import shared
from modules_forge.network_preprocessors import explain_missing
from modules_forge.utils import HWC3


class DetectRequest(BaseModel):
    """Pictures to preprocess; -1 means the preprocessor's default."""

    controlnet_module: str = "none"
    controlnet_input_images: list[str] = Field(default=[], max_length=MAX_INPUT_PICTURES)
    controlnet_processor_res: int = 512
    controlnet_threshold_a: float = Field(default=-1, allow_inf_nan=False)
    controlnet_threshold_b: float = Field(default=-1, allow_inf_nan=False)


def add_routes(_: Any, app: FastAPI) -> None:
    """Add /controlnet/... to the server if there is an API, behind the API's password (else the page's)."""
    config = current_application().config
    if not (config.api or config.nowebui):
        return
    router = create_router(RoutePolicy(credentials=config.api_auth or config.gradio_auth, log_calls=config.api_log))

    @router.get("/controlnet/version")
    async def version() -> dict[str, int]:
        return {"version": external_code.get_api_version()}

    @router.get("/controlnet/settings")
    async def settings() -> dict[str, int]:
        return {"control_net_unit_count": external_code.get_max_models_num()}

    @router.get("/controlnet/model_list")
    def model_list(update: bool = True) -> dict[str, list[str]]:
        if update:
            global_state.update_controlnet_filenames()
        return {"model_list": [name for name in global_state.get_all_controlnet_names() if name != global_state.NONE]}

    @router.get("/controlnet/module_list")
    async def module_list(alias_names: bool = False) -> dict[str, Any]:
        found = global_state.get_sorted_preprocessors()
        return {"module_list": list(found), "module_detail": {name: describe_module(one) for name, one in found.items()}}

    @router.get("/controlnet/control_types")
    def control_types() -> dict[str, Any]:
        names = ("module_list", "model_list", "default_option", "default_model")
        types = global_state.get_all_preprocessor_tags()
        return {"control_types": {tag: dict(zip(names, global_state.select_control_type(tag))) for tag in types}}

    @router.post("/controlnet/detect")
    async def detect(request: DetectRequest) -> dict[str, Any]:
        return await detect_in_queue(request)

    app.include_router(router)


async def detect_in_queue(request: DetectRequest) -> dict[str, Any]:
    """The maps of all pictures, computed in this job's turn. Raises RequestError."""
    jobs = current_application().jobs
    jobs.check_room()
    preprocessor = find_preprocessor(request)
    pictures = await run_in(pool_for(request.controlnet_input_images), decode_pictures, request.controlnet_input_images)
    job = jobs.submit(None, "controlnet detect", lambda: run_detect(request, preprocessor, pictures))
    return await wait_for_job(job, drop_from=jobs)


def decode_pictures(texts: list[str]) -> list[np.ndarray]:
    """Pictures as (H, W, 3) arrays, decoded and limited like all pictures of requests. Raises RequestError."""
    rules = fetch_rules(current_application().options)
    pictures = [decode_picture(text, f"controlnet_input_images[{index}]", rules=rules) for index, text in enumerate(texts)]
    return [HWC3(np.asarray(picture.convert("RGBA" if "A" in picture.getbands() else "RGB"))) for picture in pictures]


def describe_module(preprocessor: Any) -> dict[str, Any]:
    """The sliders of a preprocessor."""
    sliders = [preprocessor.slider_resolution, preprocessor.slider_1, preprocessor.slider_2, preprocessor.slider_3]
    return {"model_free": preprocessor.do_not_need_model, "sliders": [one.api_json for one in sliders if one.gradio_update_kwargs["visible"]]}


def find_preprocessor(request: DetectRequest) -> Any:
    """Raises RequestError for an unknown preprocessor, and for a request without pictures."""
    preprocessor = global_state.get_preprocessor(request.controlnet_module)
    if preprocessor is None:
        raise RequestError(unknown_module(request.controlnet_module))
    if not request.controlnet_input_images:
        raise RequestError("No image was selected: send controlnet_input_images, a list of base64 texts.")
    return preprocessor


def run_detect(request: DetectRequest, preprocessor: Any, pictures: list[np.ndarray]) -> dict[str, Any]:
    """The maps of all pictures, computed on the job's thread."""
    sliders = [None if value < 0 else value for value in (request.controlnet_threshold_a, request.controlnet_threshold_b)]
    resolution = min(max(request.controlnet_processor_res, 64), 4096)
    images = []
    for picture in pictures:
        found = preprocessor(picture, resolution=resolution, slider_1=sliders[0], slider_2=sliders[1])
        if isinstance(found, np.ndarray):
            images.append(_encode(HWC3(found)))
    return {"images": images, "info": "Success"}


def unknown_module(name: str) -> str:
    """The error text for a missing preprocessor."""
    missing = explain_missing(name, shared.preprocessor_dir)
    if missing is not None:
        return missing
    known = ", ".join(global_state.get_all_preprocessor_names())
    return f"ControlNet has no preprocessor {name!r}. Available: {known}. Install an extension with it, or make the map elsewhere and choose None."


def _encode(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
