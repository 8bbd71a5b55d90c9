"""What API clients ask about ControlNet: lists, and a preprocessor's result for a picture."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException
from PIL import Image
from pydantic import BaseModel

from lib_controlnet import external_code, global_state
from modules.errors import RequestError
from modules_forge import shared
from modules_forge.network_preprocessors import explain_missing
from modules_forge.utils import HWC3


class DetectRequest(BaseModel):
    """Pictures to preprocess; -1 stands for the preprocessor's own value."""

    controlnet_module: str = "none"
    controlnet_input_images: list[str] = []
    controlnet_processor_res: int = 512
    controlnet_threshold_a: float = -1
    controlnet_threshold_b: float = -1


def add_routes(_: Any, app: FastAPI) -> None:
    """Add /controlnet/... to the server."""

    @app.get("/controlnet/version")
    async def version() -> dict[str, int]:
        return {"version": external_code.get_api_version()}

    @app.get("/controlnet/settings")
    async def settings() -> dict[str, int]:
        return {"control_net_unit_count": external_code.get_max_models_num()}

    @app.get("/controlnet/model_list")
    def model_list(update: bool = True) -> dict[str, list[str]]:
        if update:
            global_state.update_controlnet_filenames()
        return {"model_list": [name for name in global_state.get_all_controlnet_names() if name != global_state.NONE]}

    @app.get("/controlnet/module_list")
    async def module_list(alias_names: bool = False) -> dict[str, Any]:
        found = global_state.get_sorted_preprocessors()
        return {"module_list": list(found), "module_detail": {name: describe_module(one) for name, one in found.items()}}

    @app.get("/controlnet/control_types")
    def control_types() -> dict[str, Any]:
        names = ("module_list", "model_list", "default_option", "default_model")
        types = global_state.get_all_preprocessor_tags()
        return {"control_types": {tag: dict(zip(names, global_state.select_control_type(tag))) for tag in types}}

    @app.post("/controlnet/detect")
    def detect(request: DetectRequest) -> dict[str, Any]:
        try:
            return run_detect(request)
        except RequestError as error:
            raise HTTPException(status_code=error.status, detail=str(error)) from error


def describe_module(preprocessor: Any) -> dict[str, Any]:
    """The sliders of a preprocessor."""
    sliders = [preprocessor.slider_resolution, preprocessor.slider_1, preprocessor.slider_2, preprocessor.slider_3]
    return {"model_free": preprocessor.do_not_need_model, "sliders": [one.api_json for one in sliders if one.gradio_update_kwargs["visible"]]}


def run_detect(request: DetectRequest) -> dict[str, Any]:
    """The maps of all pictures. Raises RequestError."""
    preprocessor = global_state.get_preprocessor(request.controlnet_module)
    if preprocessor is None:
        raise RequestError(unknown_module(request.controlnet_module))
    if not request.controlnet_input_images:
        raise RequestError("No image was selected: send controlnet_input_images, a list of base64 texts.")
    sliders = [None if value < 0 else value for value in (request.controlnet_threshold_a, request.controlnet_threshold_b)]
    resolution = min(max(request.controlnet_processor_res, 64), 4096)
    images = []
    for text in request.controlnet_input_images:
        picture = HWC3(external_code.to_base64_nparray(text))
        found = preprocessor(picture, resolution=resolution, slider_1=sliders[0], slider_2=sliders[1])
        if isinstance(found, np.ndarray):
            images.append(_encode(HWC3(found)))
    return {"images": images, "info": "Success"}


def unknown_module(name: str) -> str:
    """What is said of a preprocessor that is not there."""
    missing = explain_missing(name, shared.preprocessor_dir)
    if missing is not None:
        return missing
    known = ", ".join(global_state.get_all_preprocessor_names())
    return f"ControlNet has no preprocessor {name!r}; it has {known}. Others come from extensions, or make the map elsewhere and choose None."


def _encode(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
