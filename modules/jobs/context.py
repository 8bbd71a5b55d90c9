"""What a job may use of the running program: settings, state, models, files. Nothing about the page or the API.

`Application` implements it. A request stores the context it was created in (`p.context`), and code working on a request uses that. Functions
that extensions call without a request (`images.save_image`, `rng.ImageRNG` ...) use the installed context.

    state = p.context.state
    if state.interrupted: ...

Must not import the application: everything the application is built from may import this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from modules.app_config import AppConfig
    from modules.checkpoints.cache import FileCache
    from modules.checkpoints.hashes import HashStore
    from modules.checkpoints.listing import CheckpointRegistry
    from modules.checkpoints.models import ModelHost
    from modules.checkpoints.vae_files import ModuleRegistry
    from modules.jobs.bar import JobBar
    from modules.jobs.queue import JobQueue
    from modules.jobs.state import State
    from modules.pictures.upscaler_models import UpscalerModels
    from modules.prompts.styles import StyleDatabase
    from modules.settings.folder_policy import FolderPolicy
    from modules.settings.options import Options


class RemoteEngine(Protocol):
    """Makes the pictures of requests on other machines; see modules.cluster."""

    def process(self, p: Any) -> Any:
        """As modules.processing.process_images. Runs on the job's thread."""

    def describe(self) -> dict[str, Any]:
        """The machines, for GET multi-gpu, /metrics and the panel of GPUs."""

    def drain(self, worker: str, *, is_draining: bool = True) -> None:
        """Give a worker or machine no new jobs, or give it jobs again. Raises RequestError if there is none of this name."""


class JobContext(Protocol):
    """`options` are the current settings; a job reads its own snapshot, `p.options`."""

    config: AppConfig
    options: Options
    state: State
    jobs: JobQueue
    checkpoints: CheckpointRegistry
    additional_modules: ModuleRegistry
    models: ModelHost
    file_cache: FileCache
    hashes: HashStore
    styles: StyleDatabase
    upscaler_models: UpscalerModels | None
    job_bar: JobBar
    last_profile: Any
    folders: FolderPolicy
    remote_engine: RemoteEngine | None
    """What makes the pictures instead of this process's engine; None on a server of its own."""


_installed: JobContext | None = None


def install_context(context: JobContext | None) -> None:
    """Make `context` the one for new requests; None removes it. Called by `application.install`."""
    global _installed  # noqa: PLW0603 - the only global reference to the running program below processing
    _installed = context


def installed_context() -> JobContext | None:
    """The context for new requests; None if there is none."""
    return _installed


def required_context() -> JobContext:
    """Like installed_context(), but raises RuntimeError if there is none."""
    if _installed is None:
        raise RuntimeError("no application is installed yet. webui.py installs it at startup, tests with modules.application.install().")
    return _installed
