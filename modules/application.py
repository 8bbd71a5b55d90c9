"""The running application as one value: configuration, settings, state, job queue and models.

webui.py builds and installs one; page, API and guests use the installed one. Must not know gradio or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.args import dynamic_args
from modules.app_config import SCRIPT_DIR, AppConfig
from modules.checkpoints.cache import FileCache
from modules.checkpoints.hashes import HashStore
from modules.checkpoints.listing import CheckpointRegistry
from modules.checkpoints.models import LoadEngine, ModelHost, load_engine
from modules.checkpoints.vae_files import ModuleRegistry
from modules.jobs import context
from modules.jobs.bar import JobBar
from modules.jobs.context import RemoteEngine
from modules.jobs.queue import JobQueue
from modules.jobs.state import State
from modules.jobs.states import JobStates
from modules.pictures.upscaler_models import UpscalerModels, build_upscaler_models
from modules.prompts.styles import StyleDatabase
from modules.settings.folder_policy import FolderPolicy
from modules.settings.options import FOLDER_FOR_OUTPUTS, Options
from modules.settings.table import build_option_table, restricted_opts
from modules_forge import shared as control_models


@dataclass(kw_only=True)
class Application:
    """The parts of one server. `demo` and `fastapi_app` are set when the page is built."""

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
    folders: FolderPolicy
    upscaler_models: UpscalerModels | None = None
    extensions: list[Any] = field(default_factory=list)
    """The extensions found, and the script runners by tab name; modules.scripts.load_scripts fills both."""
    script_runners: dict[str, Any] = field(default_factory=dict)
    job_bar: JobBar = field(default_factory=JobBar)
    last_profile: Any = None
    remote_engine: RemoteEngine | None = None
    demo: Any = None
    fastapi_app: Any = None
    restartable: bool = False
    history: Any = None
    closers: list[Callable[[], None]] = field(default_factory=list)
    """Called by close()."""
    started_at: float = field(default_factory=time.time)

    def save_options(self) -> None:
        """Write the settings file. Raises OptionError with --freeze-settings."""
        self.options.save(self.config.settings_file)

    def close(self) -> None:
        """Close the job queue, where the running job stops within one step, then what else was opened."""
        self.jobs.close()
        while self.closers:
            self.closers.pop()()


def create_options(config: AppConfig) -> Options:
    """This run's settings, read from its settings file."""
    table = build_option_table(config.flags, outputs_dir=config.outputs_dir, saved_dir=config.data_dir / "log" / "images")
    restricted = restricted_opts if config.hide_ui_dir_config else frozenset()
    frozen_keys = frozenset(table) if config.freeze_settings else _keys_frozen_by_name(config, table)
    options = Options(table, restricted, frozen_keys=frozen_keys)
    options.load(config.settings_file)
    options.guard = create_folder_policy(config, options).check
    return options


def create_folder_policy(config: AppConfig, options: Options) -> FolderPolicy:
    """Which folders may be named from now on; those in the settings file are the operator's choice."""
    configured = [options.data[key] for key, info in options.data_labels.items() if info.path_kind == FOLDER_FOR_OUTPUTS and options.data.get(key)]
    return FolderPolicy(config, configured, hidden_keys=frozenset(options.restricted_opts))


def _keys_frozen_by_name(config: AppConfig, table: dict[str, Any]) -> frozenset[str]:
    keys = _split(config.flags.get("freeze_specific_settings"))
    sections = _split(config.flags.get("freeze_settings_in_sections"))
    return frozenset(key for key, info in table.items() if key in keys or (info.section and info.section[0] in sections))


def _split(value: Any) -> set[str]:
    return {part.strip() for part in value.split(",")} if isinstance(value, str) else set()


def build_application(config: AppConfig, *, load: LoadEngine = load_engine) -> Application:
    """Everything below the page, wired up. Reads the settings file and scans for models; loads none.

    With --cluster every running job has its own state, because several run at a time.
    """
    options = create_options(config)
    file_cache = FileCache(config.data_dir / "cache")
    hashes = HashStore(file_cache, enabled=not config.no_hashing)
    checkpoints = CheckpointRegistry(config.ckpt_dirs, hashes, extra_files=_named_checkpoint(config), demo_files=_demo_checkpoints(config))
    additional_modules = ModuleRegistry(config.vae_dirs, config.text_encoder_dirs)
    state = State() if config.cluster is None else JobStates()
    checkpoints.refresh()
    additional_modules.refresh()
    return Application(
        config=config,
        options=options,
        state=state,
        jobs=JobQueue(state, config.queue_limit),
        checkpoints=checkpoints,
        additional_modules=additional_modules,
        models=ModelHost(checkpoints, additional_modules, config.backend, options.snapshot, embedding_dirs=config.embeddings_dirs, load=load),
        file_cache=file_cache,
        hashes=hashes,
        styles=StyleDatabase(config.styles_files),
        folders=create_folder_policy(config, options),
        upscaler_models=build_upscaler_models(config.flags, options),
    )


def _demo_checkpoints(config: AppConfig) -> tuple[Path, ...]:
    """The bundled models, if the data folder is elsewhere, so that a new user can try something before having a model."""
    folder = SCRIPT_DIR / "models" / "Stable-diffusion"
    return tuple(sorted(folder.glob("demo-*.safetensors"))) if config.use_demo and folder not in config.ckpt_dirs else ()


def _named_checkpoint(config: AppConfig) -> tuple[Path, ...]:
    return (config.ckpt,) if config.ckpt is not None and config.ckpt.is_file() else ()


_installed: Application | None = None


def install(app: Application | None) -> None:
    """Make `app` the application used by guests and facades; None removes it."""
    global _installed  # noqa: PLW0603 - the only global reference to the running application
    _installed = app
    context.install_context(app)
    if app is not None:
        dynamic_args["embedding_dir"] = str(next(iter(app.config.embeddings_dirs), "./embeddings"))
        control_models.configure_folders(
            controlnet_dir=app.config.controlnet_dirs[0],
            preprocessor_dir=Path(app.config.flags["controlnet_preprocessor_models_dir"]),
            diffusers_dir=app.config.models_dir / "diffusers",
        )


def current_application() -> Application:
    """The installed application. Raises RuntimeError if there is none."""
    if _installed is None:
        raise RuntimeError("no application is installed yet. webui.py installs it at startup, tests with modules.application.install().")
    return _installed


def application_or_none() -> Application | None:
    """The installed application, or None."""
    return _installed
