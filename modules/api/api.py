"""The HTTP API: every route of /sdapi/v1 and /internal on a FastAPI application. Also two picture functions that extensions import.

Must not know the page.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from PIL import Image

from modules.api import models
from modules.api.embeddings import EmbeddingRoutes
from modules.api.extras import ExtrasRoutes, interrogate
from modules.api.fetching import FetchError, is_public, resolve
from modules.api.generation import GenerationRoutes, Process
from modules.api.internal import InternalRoutes
from modules.api.jobs import JobRoutes
from modules.api.listings import ListingRoutes
from modules.api.metrics import MetricsRoutes
from modules.api.pictures import decode_picture, encode_picture, encode_settings, fetch_rules, infotext_of
from modules.api.routes import RoutePolicy, create_router
from modules.api.server import ServerRoutes
from modules.pictures.writing import EncodeSettings
from modules.processing import process_images

if TYPE_CHECKING:
    from modules.application import Application

log = logging.getLogger(__name__)

__all__ = ["Api", "create_api", "create_internal_api", "decode_base64_to_image", "encode_pil_to_base64", "models", "verify_url"]

_PREFIX = "/sdapi/v1"
_INSTALLED = "internal_api_installed"


def create_api(app: Application, fastapi_app: FastAPI, *, process: Process = process_images) -> None:
    """Add the API's routes to `fastapi_app`: the page's own always, /sdapi/v1 with --api or --nowebui.

    `process` runs generation requests.
    """
    create_internal_api(app, fastapi_app)
    if not (app.config.api or app.config.nowebui):
        return
    router = create_router(RoutePolicy(credentials=app.config.api_auth, log_calls=app.config.api_log))
    _add_generation(router, GenerationRoutes(app, process), ExtrasRoutes(app))
    _add(router, "POST", "create/embedding", EmbeddingRoutes(app).create, models.CreateResponse)
    _add_job_control(router, JobRoutes(app))
    _add_listings(router, ListingRoutes(app))
    _add_server(router, ServerRoutes(app), stoppable=app.config.api_server_stop)
    router.add_api_route("/metrics", MetricsRoutes(app).metrics, methods=["GET"])
    fastapi_app.include_router(router)


def create_internal_api(app: Application, fastapi_app: FastAPI) -> None:
    """Add the routes that the page itself calls. Calling it again changes nothing."""
    if getattr(fastapi_app.state, _INSTALLED, False):
        return
    setattr(fastapi_app.state, _INSTALLED, True)
    jobs, internal = JobRoutes(app), InternalRoutes(app)
    open_router = create_router(RoutePolicy())
    open_router.add_api_route("/internal/ping", internal.ping, methods=["GET"])
    open_router.add_api_route("/internal/ready", internal.ready, methods=["GET"])
    open_router.add_api_route("/internal/progress", jobs.task_progress, methods=["POST"], response_model=models.TaskProgressResponse)
    # These reveal facts about the machine and other users' task names, so they need the password if one is set.
    closed_router = create_router(RoutePolicy(credentials=app.config.api_auth or app.config.gradio_auth, log_calls=app.config.api_log))
    for path, handler, response_model in (
        ("pending-tasks", jobs.pending_tasks, models.PendingTasksResponse),
        ("quicksettings-hint", internal.quicksettings_hint, list[models.QuicksettingsHint]),
        ("profile-startup", internal.profile_startup, None),
        ("sysinfo", internal.sysinfo, None),
        ("sysinfo-download", internal.sysinfo_download, None),
    ):
        closed_router.add_api_route(f"/internal/{path}", handler, methods=["GET"], response_model=response_model)
    fastapi_app.include_router(open_router)
    fastapi_app.include_router(closed_router)


def _add(router: APIRouter, method: str, name: str, handler: Callable[..., Any], response_model: Any = None) -> None:
    router.add_api_route(f"{_PREFIX}/{name}", handler, methods=[method], response_model=response_model)


def _add_generation(router: APIRouter, generation: GenerationRoutes, extras: ExtrasRoutes) -> None:
    _add(router, "POST", "txt2img", generation.txt2img, models.TextToImageResponse)
    _add(router, "POST", "img2img", generation.img2img, models.ImageToImageResponse)
    _add(router, "POST", "extra-single-image", extras.single_image, models.ExtrasSingleImageResponse)
    _add(router, "POST", "extra-batch-images", extras.batch_images, models.ExtrasBatchImagesResponse)
    _add(router, "POST", "png-info", extras.png_info, models.PNGInfoResponse)
    _add(router, "POST", "interrogate", interrogate)


def _add_job_control(router: APIRouter, jobs: JobRoutes) -> None:
    _add(router, "GET", "progress", jobs.progress, models.ProgressResponse)
    _add(router, "POST", "interrupt", jobs.interrupt)
    _add(router, "POST", "skip", jobs.skip)


def _add_listings(router: APIRouter, listings: ListingRoutes) -> None:
    for name, handler, response_model in (
        ("samplers", listings.samplers, list[models.SamplerItem]),
        ("schedulers", listings.schedulers, list[models.SchedulerItem]),
        ("upscalers", listings.upscalers, list[models.UpscalerItem]),
        ("latent-upscale-modes", listings.latent_upscale_modes, list[models.LatentUpscalerModeItem]),
        ("sd-models", listings.sd_models, list[models.SDModelItem]),
        ("sd-modules", listings.sd_modules, list[models.SDModuleItem]),
        ("sd-vae", listings.sd_vae, list[models.SDModuleItem]),
        ("hypernetworks", listings.hypernetworks, list[models.HypernetworkItem]),
        ("face-restorers", listings.face_restorers, list[models.FaceRestorerItem]),
        ("realesrgan-models", listings.realesrgan_models, list[models.RealesrganItem]),
        ("prompt-styles", listings.prompt_styles, list[models.PromptStyleItem]),
        ("embeddings", listings.embeddings, models.EmbeddingsResponse),
        ("scripts", listings.scripts, models.ScriptsList),
        ("script-info", listings.script_info, list[models.ScriptInfo]),
        ("extensions", listings.extensions, list[models.ExtensionItem]),
    ):
        _add(router, "GET", name, handler, response_model)
    _add(router, "POST", "refresh-embeddings", listings.refresh_embeddings)
    _add(router, "POST", "refresh-checkpoints", listings.refresh_checkpoints)
    _add(router, "POST", "refresh-vae", listings.refresh_vae)


def _add_server(router: APIRouter, server: ServerRoutes, *, stoppable: bool) -> None:
    _add(router, "GET", "options", server.get_options)
    _add(router, "POST", "options", server.set_options)
    _add(router, "GET", "cmd-flags", server.cmd_flags)
    _add(router, "GET", "memory", server.memory, models.MemoryResponse)
    _add(router, "GET", "multi-gpu", server.multi_gpu, models.MultiGpuResponse)
    _add(router, "POST", "cluster/drain", server.drain)
    _add(router, "POST", "unload-checkpoint", server.unload_checkpoint)
    _add(router, "POST", "reload-checkpoint", server.reload_checkpoint)
    if stoppable:
        _add(router, "POST", "server-stop", server.server_stop)
        _add(router, "POST", "server-restart", server.server_restart)
        _add(router, "POST", "server-kill", server.server_kill)


# Names that extensions import


class Api:
    """The API as extensions hold it that were written for A1111: its generation routes to be called from Python, and routes of their own to be added.

    Works on the installed application; a password is asked for by the server, whoever adds a route. `queue_lock` is kept for those that read it.
    """

    def __init__(self, app: FastAPI, queue_lock: Any = None) -> None:
        from modules.application import current_application  # the application is built without the API

        application = current_application()
        self.app, self.queue_lock = app, queue_lock
        self._generation, self._extras = GenerationRoutes(application, process_images), ExtrasRoutes(application)

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        """Put a route on the server."""
        self.app.add_api_route(path, endpoint, **kwargs)

    def text2imgapi(self, txt2imgreq: models.StableDiffusionProcessingTxt2Img) -> models.TextToImageResponse:
        """As POST /sdapi/v1/txt2img. Waits for the job; not to be called from inside one. Raises what the route answers as an error."""
        answer: models.TextToImageResponse = _wait_for(self._generation.txt2img(txt2imgreq))
        return answer

    def img2imgapi(self, img2imgreq: models.StableDiffusionProcessingImg2Img) -> models.ImageToImageResponse:
        """As POST /sdapi/v1/img2img."""
        answer: models.ImageToImageResponse = _wait_for(self._generation.img2img(img2imgreq))
        return answer

    def extras_single_image_api(self, req: models.ExtrasSingleImageRequest) -> models.ExtrasSingleImageResponse:
        """As POST /sdapi/v1/extra-single-image."""
        answer: models.ExtrasSingleImageResponse = _wait_for(self._extras.single_image(req))
        return answer


def _wait_for(answer: Coroutine[Any, Any, Any]) -> Any:
    """What a route's coroutine gives, on a thread and a loop of its own: the caller may be in a loop already."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, answer).result()


def decode_base64_to_image(encoding: str) -> Image.Image:
    """The picture in a base64 text, data URL or (if the settings allow) http URL. Raises RequestError."""
    from modules.application import application_or_none  # extensions call this without an application

    application = application_or_none()
    return decode_picture(encoding, "image", rules=None if application is None else fetch_rules(application.options))


def encode_pil_to_base64(image: Image.Image) -> bytes:
    """`image` as base64, in the file format of the settings, with its infotext."""
    from modules.application import application_or_none  # extensions call this without an application

    application = application_or_none()
    options = None if application is None else application.options
    settings = EncodeSettings() if options is None else encode_settings(options)
    extension = "png" if options is None else str(options.samples_format)
    return encode_picture(image, extension=extension, infotext=infotext_of(image), settings=settings).encode("ascii")


def verify_url(url: str) -> bool:
    """Whether a URL leads to the public internet."""
    from urllib.parse import urlsplit

    try:
        host = urlsplit(url).hostname
        return host is not None and is_public(resolve(host, 0, allow_local=False))
    except (FetchError, ValueError):
        return False
