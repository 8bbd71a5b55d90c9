"""Which folders of this machine a setting or request may name. Pictures and texts are never written into folders the program runs or reads.

The deepest known folder decides: `outputs` in the program's folder is for outputs, `outputs/../models` is not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any

from modules.app_config import SCRIPT_DIR, AppConfig
from modules.errors import OptionError, RequestError
from modules.settings.options import FILE_OF_LOGS, FOLDER_FOR_OUTPUTS, OptionInfo

LOG_SUFFIXES = (".json", ".json.gz")
_PARTS_OF_PROGRAM = (
    *("modules", "modules_forge", "backend", "extensions", "extensions-builtin", "javascript", "tools", "tests", "docs", "deploy", "benchmarks"),
    *(
        "models",
        "embeddings",
        "repositories",
        "scripts",
        "localizations",
        "config_states",
        "cache",
        "logs",
        "venv",
        ".venv",
        ".git",
        "html",
        "configs",
    ),
)


class FolderPolicy:
    """`configured` are the folders from the operator's settings file; everyone may use them."""

    def __init__(self, config: AppConfig, configured: Iterable[Any] = (), *, hidden_keys: frozenset[str] = frozenset()) -> None:
        self.config = config
        self.hidden_keys = hidden_keys
        outputs = [config.outputs_dir, config.data_dir / "outputs", config.data_dir / "log", SCRIPT_DIR / "outputs", SCRIPT_DIR / "log"]
        self.output_roots = [folder for folder in map(resolved, outputs) if folder is not None]
        self.configured = [folder for folder in map(resolved, configured) if folder is not None and not self.is_protected(folder)]

    def check(self, key: str, info: OptionInfo, value: Any) -> None:
        """Raises OptionError for a value that nobody may set: a program folder for outputs, or a path as the name of a log."""
        if key in self.hidden_keys:
            raise OptionError(f"setting {key!r} may not be changed while --hide-ui-dir-config is on.")
        if info.path_kind is None or not value:
            return
        if info.path_kind == FILE_OF_LOGS:
            check_log_name(key, value)
            return
        folder = resolved(value)
        if folder is None:
            raise OptionError(f"setting {key!r}: {str(value)[:200]!r} is not a valid path on this machine.")
        if info.path_kind == FOLDER_FOR_OUTPUTS and self.is_protected(folder):
            raise OptionError(
                f"setting {key!r}: {str(value)[:200]!r} belongs to the program, its models or its settings. "
                f"Choose a folder below {self.config.outputs_dir}, or one that the program does not use."
            )

    def check_from_client(self, key: str, info: OptionInfo, value: Any, *, is_trusted: bool) -> None:
        """check(); in addition, a client without a password may only choose output folders. Raises OptionError."""
        self.check(key, info, value)
        folder = resolved(value) if info.path_kind not in (None, FILE_OF_LOGS) and value else None
        if folder is None or is_trusted:
            return
        is_output = info.path_kind == FOLDER_FOR_OUTPUTS
        if not self._is_for_everyone(folder) and (is_output or not folder.is_relative_to(self.config.data_dir.resolve())):
            raise OptionError(
                f"setting {key!r}: {str(value)[:200]!r} is outside {self.config.outputs_dir if is_output else self.config.data_dir}. "
                "Without a password (--api-auth, --gradio-auth) remote clients cannot choose such folders; set it in the settings file "
                "or on a local page."
            )

    def _is_for_everyone(self, folder: Path) -> bool:
        return not self.is_protected(folder) and any(folder.is_relative_to(root) for root in (*self.output_roots, *self.configured))

    def is_protected(self, folder: Path | str) -> bool:
        """Whether pictures may not be saved there: folders that the program runs, reads or stores data in, except output folders inside them."""
        path = resolved(folder)
        if path is None:
            return True
        config = self.config
        named = (*config.ckpt_dirs, *config.vae_dirs, *config.text_encoder_dirs, *config.lora_dirs, *config.controlnet_dirs, *config.embeddings_dirs)
        files = (config.settings_file, *config.styles_files)
        roots = (SCRIPT_DIR, config.data_dir)
        own = [Path(sys.prefix), config.models_dir, config.extensions_dir, *named, *(root / part for root in roots for part in _PARTS_OF_PROGRAM)]
        own += [path for root in (*roots, *(file.parent for file in files)) if path == resolved(root)]  # itself, but not a new subfolder
        protected = _depth_of_deepest(path, own)
        return protected > 0 and protected > _depth_of_deepest(path, self.output_roots)

    def check_written(self, wanted: Path | str, final: Path) -> None:
        """Raises RequestError if a name pattern leads from an output folder into one of the program's folders."""
        if self.is_protected(final) and not self.is_protected(wanted):
            raise RequestError(
                f"the name pattern leads to {final}, which belongs to the program. Choose another pattern in Settings, Saving to a directory."
            )

    def check_batch_folder(self, what: str, folder: str, *, is_written: bool = False) -> None:
        """Raises RequestError for a batch folder that a user of the page may not name; see docs/security.md."""
        if not folder:
            return
        path = resolved(folder)
        if path is None or (is_written and self.is_protected(path)):
            raise RequestError(f"{what} {folder[:200]!r} belongs to the program or is not a valid path. Choose a folder for pictures.")
        allowed = (*self.output_roots, *self.configured, *(found for found in map(resolved, self.config.gradio_allowed_paths) if found is not None))
        if not self.config.page_is_trusted and not any(path.is_relative_to(root) for root in allowed):
            raise RequestError(
                f"{what} {folder[:200]!r}: this server is reachable from other machines and has no password, so only folders below "
                f"{self.config.outputs_dir} are allowed. Upload the pictures, start with --gradio-auth, or allow it with --gradio-allowed-path."
            )


def check_log_name(key: str, value: Any) -> None:
    """Raises OptionError unless `value` is a plain file name with a log suffix."""
    name = str(value)
    is_plain = name == Path(name).name == PureWindowsPath(name).name and not name.startswith(".") and name.isprintable() and len(name) <= 200
    if not is_plain or not name.lower().endswith(LOG_SUFFIXES):
        raise OptionError(f"setting {key!r}: {name[:200]!r} is not a file name ending in {' or '.join(LOG_SUFFIXES)}; folders are not allowed.")


def resolved(path: Any) -> Path | None:
    """The path with links and `..` resolved; None if it is invalid."""
    if not isinstance(path, (str, Path)) or not str(path):
        return None
    try:
        return Path(path).resolve()
    except (OSError, ValueError, RuntimeError):  # too long; contains NUL; circular links
        return None


def _depth_of_deepest(path: Path, roots: Iterable[Path]) -> int:
    """Number of parts of the deepest of `roots` that contains `path`; 0 if none does."""
    found = (root for root in map(resolved, roots) if root is not None)
    return max((len(root.parts) for root in found if path.is_relative_to(root)), default=0)
