"""The composition root: probes devices, builds the application, the API and the page, serves them, and shuts them down. No logic."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from modules import application
from modules.app_config import AppConfig
from modules.application import Application, build_application
from modules.checkpoints.import_lock import network_imports
from modules.checkpoints.models import select_starting_checkpoint
from modules.launch.devices import find_devices
from modules.launch.errors import SetupError
from modules.launch.timer import startup_timer
from modules.pictures import unfinished_files
from modules.scripts import callbacks

if TYPE_CHECKING:
    from modules.cluster.front import ClusterFront
    from modules.http_edge.server import WebServer

log = logging.getLogger(__name__)

FINISH_TIMEOUT_S = 10.0
QUIET_LIBRARIES = ("matplotlib", "transformers", "diffusers", "accelerate", "torchao", "torch.distributed")


def main(config: AppConfig) -> int:
    """Run the server; returns the process's exit code."""
    quiet_libraries()
    if config.list_gpus:
        return list_devices(config)
    try:
        return run(config)
    except SetupError as error:
        log.error("%s", error)
        return 1


def run(config: AppConfig) -> int:
    """Serve until a command or Ctrl+C. Raises SetupError."""
    from modules.http_edge.server import WebServer  # imports fastapi and uvicorn, which --list-gpus does not need

    server = WebServer(config)
    engine = EngineStart(config)
    app = build_application(config)
    app.restartable = True
    application.install(app)
    front = start_front(app) if config.cluster is not None else None
    select_checkpoint(app)
    unfinished_files.start_clearing(app)
    startup_timer.record("application")
    try:
        command = serve(app, server, engine, front)
        while command == "restart":
            log.info("Restarting.")
            callbacks.app_reload_callback()
            server = WebServer(config)
            command = serve(app, server, engine, front)
    finally:
        app.close()
        if front is not None:
            front.close()
        application.install(None)
        engine.finish()
    return 0


def start_front(app: Application) -> ClusterFront:
    """Make this server the front of a cluster (--cluster). Raises SetupError."""
    from modules.cluster.start import connect_front  # imports ray, if it is installed

    return connect_front(app)


def serve(app: Application, server: WebServer, engine: EngineStart, front: ClusterFront | None = None) -> str:
    """Build the API and the page and serve until a command ends it; returns the command."""
    from modules.api.api import create_api, create_internal_api
    from modules.http_edge.server import create_fastapi_app, keep_page_last

    app.jobs.reopen()
    fastapi_app = create_fastapi_app(app.config)
    app.fastapi_app = fastapi_app
    try:
        (create_api if app.config.api or app.config.nowebui else create_internal_api)(app, fastapi_app)
        startup_timer.record("API")
        if not app.config.nowebui:
            add_page(app, fastapi_app, engine)
        else:
            engine.wait_for_devices()
            load_extensions(app)
        if front is not None:
            front.take_up_jobs()
        callbacks.app_started_callback(app.demo, fastapi_app)
        keep_page_last(fastapi_app)
        server.start(fastapi_app)
        startup_timer.record("server")
        announce(app, server)
        engine.import_networks()
        return wait_for_command(app)
    finally:
        gc.unfreeze()
        app.jobs.close()  # first, so that clients waiting for a job still get an answer
        server.stop()


def load_extensions(app: Application) -> None:
    """Load extensions, their settings and, without a page, their controls, from which the API takes default arguments."""
    from modules import scripts

    scripts.load_scripts(app)
    if app.config.nowebui and scripts.scripts_data:
        from modules.scripts.without_page import build_controls  # imports gradio

        build_controls(app)
    startup_timer.record("extensions")


def files_of_extensions() -> dict[str, Any]:
    """Scripts and style sheets of extensions, for the page."""
    from modules import scripts

    found = [*scripts.list_scripts("javascript", ".js"), *scripts.list_scripts("javascript", ".mjs")]
    sheets = scripts.list_files_with_name("style.css", include_own=False)
    return {"more_scripts": [Path(file.path) for file in found], "more_sheets": [Path(sheet) for sheet in sheets]}


def add_page(app: Application, fastapi_app: Any, engine: EngineStart) -> None:
    """Add gradio's page to the API's app."""
    import gradio  # noqa: F401 - heavy: imported while the engine's thread imports torch

    startup_timer.record("import gradio")
    engine.wait_for_devices()
    startup_timer.record("import torch")
    load_extensions(app)
    from modules.http_edge.server import mount_page
    from modules.ui import choices, extra_networks_routes, file_routes, history_routes, page, queue_routes
    from modules.ui import tabs as ui

    extra_networks_routes.add_routes(app, fastapi_app)
    file_routes.add_routes(app, fastapi_app)
    history_routes.add_routes(app, fastapi_app)
    queue_routes.add_routes(app, fastapi_app)
    app.demo = ui.create_ui(app)
    settings = page.page_settings(app.config, app.options.gradio_theme, **files_of_extensions(), localization=choices.localization_table(app))
    mount_page(fastapi_app, app.demo, app.config, settings)
    startup_timer.record("page")


def announce(app: Application, server: WebServer) -> None:
    """Log where the server is, and open what the flags ask to open."""
    from modules.http_edge.access import warn_of_open_parts
    from modules.http_edge.server import open_browser, open_tunnel

    config = app.config
    log.info("%s: %s", "API" if config.nowebui else "Running on", server.address)
    if config.log_startup:
        log.info("Startup time: %s", startup_timer.summary())
    if config.share and not config.nowebui and (public := open_tunnel(server)):
        log.info("Public address: %s", public)
        app.fastapi_app.edge.names.add(urlsplit(public).netloc)
    if warning := warn_of_open_parts(config):
        log.warning("%s", warning)
    local = config.host in ("127.0.0.1", "localhost", "::1")
    wants_browser = app.options.auto_launch_browser == "Remote" or (app.options.auto_launch_browser == "Local" and local)
    if config.has_screen and not config.nowebui and (config.autolaunch or wants_browser):
        open_browser(server.address)


def wait_for_command(app: Application) -> str:
    """Sleep until "stop", "kill" or "restart"; Ctrl+C means "stop"."""
    try:
        while True:
            command = app.state.wait_for_server_command(timeout=1.0)
            if command in ("stop", "kill", "restart"):
                return command
    except KeyboardInterrupt:
        log.info("Stopping.")
        return "stop"


def select_checkpoint(app: Application) -> None:
    """Select the startup checkpoint: --ckpt, the saved one, or the first; with --sdxl an SDXL one."""
    config, options = app.config, app.options
    info = select_starting_checkpoint(app.checkpoints, named=config.ckpt, saved=options.sd_model_checkpoint, want_sdxl=config.sdxl)
    if info is not None:
        options.data["sd_model_checkpoint"] = info.title


def list_devices(config: AppConfig) -> int:
    """Log the devices that --device-id can name, what is on them, and with --ckpt the plan for that checkpoint."""
    from backend import memory_management  # imports torch
    from backend.checkpoint_file import CheckpointError
    from backend.devices.probing import DeviceError, probe_devices
    from backend.parallel.planning.planner import WantedStrategy
    from backend.parallel.planning.preview import preview_plan
    from backend.parallel.running import status
    from modules.jobs.gpu_report import preview_text, slots_text

    try:
        memory_management.configure(config.backend, probe_devices(config.backend))
        lines = slots_text(status.describe_slots())
        if config.ckpt is not None:
            lines += preview_text(preview_plan(config.ckpt, strategy=cast("WantedStrategy", config.backend.multi_gpu_strategy)), config.ckpt.name)
    except (DeviceError, CheckpointError) as error:
        log.error("%s", error)
        return 1
    for line in lines:
        log.info("%s", line)
    return 0


def quiet_libraries() -> None:
    """Hide what libraries log for each other; keep their errors."""
    for name in QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


class EngineStart:
    """Imports the engine and probes devices on a separate thread: torch in parallel with gradio; what only pictures need after the page is up."""

    def __init__(self, config: AppConfig) -> None:
        self._importer: threading.Thread | None = None
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-start")
        self._devices = worker.submit(find_devices, config)
        worker.shutdown(wait=False)

    def wait_for_devices(self) -> None:
        """Block until the devices are known. Raises SetupError if a flag names a missing one."""
        try:
            self._devices.result()
        except ValueError as error:  # a DeviceError, whose class is in a file that imports torch
            raise SetupError(str(error)) from error

    def import_networks(self) -> None:
        """Start importing the rest, so that the first picture need not wait. A failure recurs in that job, which reports it."""
        self._importer = threading.Thread(target=self._import_networks, name="engine-import", daemon=True)
        self._importer.start()

    def finish(self) -> None:
        """Wait for running threads: the interpreter must not exit while a thread is inside torch's code."""
        if self._importer is not None:
            self._importer.join(FINISH_TIMEOUT_S)

    def _import_networks(self) -> None:
        import importlib

        with contextlib.suppress(ImportError, OSError, RuntimeError), network_imports:  # the first job meets what fails again
            for name in ("backend.loader", "modules.processing.pictures", "modules.samplers.kdiffusion"):
                importlib.import_module(name)
        gc.freeze()  # page and libraries stay loaded: collections would scan half a million objects for nothing
