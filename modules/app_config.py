"""The application's startup configuration as one frozen value.

Imports in milliseconds: no torch, no gradio, no probing.
`modules.launch.cmd_args` builds it from the command line; this file must not know argv or the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backend.args import BackendConfig

SCRIPT_DIR = Path(__file__).resolve().parents[1]
UI_PORT = 7860
API_PORT = 7861


@dataclass(frozen=True, kw_only=True, slots=True)
class AppConfig:
    """The whole configuration of one run. Folders may not exist yet: `webui.py` creates those it writes to.

    The first entry of each `*_dirs` is the standard folder; folders from flags follow in the order given.
    `notices` are messages for the user from parsing the flags (a flag without effect, a missing folder).
    `has_screen` says whether a browser can be shown on this machine; `subpath` has no slash at either end.
    `cluster` is the address of a Ray cluster, "auto" or "local"; `cluster_workers` the least and the largest number of workers, None for one per
    machine.
    `flags` contains every flag by its name with underscores, as `shared.cmd_opts` shows them to extensions.
    """

    data_dir: Path
    models_dir: Path
    ckpt: Path | None = None
    ckpt_dirs: tuple[Path, ...]
    vae_dirs: tuple[Path, ...]
    text_encoder_dirs: tuple[Path, ...]
    lora_dirs: tuple[Path, ...]
    controlnet_dirs: tuple[Path, ...]
    embeddings_dirs: tuple[Path, ...]
    outputs_dir: Path
    extensions_dir: Path
    settings_file: Path
    ui_config_file: Path
    styles_files: tuple[Path, ...]

    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    autolaunch: bool = False
    has_screen: bool = False
    theme: str | None = None
    subpath: str | None = None
    api: bool = False
    nowebui: bool = False
    api_auth: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    api_log: bool = False
    api_server_stop: bool = False
    allow_code: bool = False
    gradio_auth: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    gradio_allowed_paths: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    cors_origins_regex: str | None = None
    tls_keyfile: Path | None = None
    tls_certfile: Path | None = None
    timeout_keep_alive_s: int = 30

    use_demo: bool = True
    no_hashing: bool = False
    freeze_settings: bool = False
    hide_ui_dir_config: bool = False
    disable_extension_access: bool = False
    filenames_max_length: int = 128
    disable_console_progressbars: bool = False
    sdxl: bool = False
    controlnet: bool = False
    list_gpus: bool = False
    cluster: str | None = None
    gpus_per_replica: float | None = None
    cluster_workers: tuple[int, int] | None = None
    queue_limit: int = 256
    log_startup: bool = False
    loglevel: str = "INFO"
    log_format: str = "text"

    backend: BackendConfig = field(default_factory=BackendConfig)
    flags: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    notices: tuple[str, ...] = ()

    @property
    def listen_port(self) -> int:
        """The given port, else 7860 for the page and 7861 for the API alone."""
        return self.port if self.port is not None else (API_PORT if self.nowebui else UI_PORT)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return not self.share and (self.host in ("localhost", "::1") or self.host.startswith("127."))

    @property
    def page_is_trusted(self) -> bool:
        """Whether users of the page are on this machine or have a password: such users may name folders."""
        return self.is_local or bool(self.gradio_auth)
