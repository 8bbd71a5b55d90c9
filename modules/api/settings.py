"""Settings that a client sends, with a request or for good: known keys, fitting values, checkpoints that are there, folders that are safe."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.checkpoints import CheckpointInfo
from modules.errors import OptionError
from modules.shared_options import restricted_opts

if TYPE_CHECKING:
    from modules.application import Application

FOLDER_KEYS = frozenset(key for key in restricted_opts if "pattern" not in key) | {"font", "control_net_models_path", "control_net_modules_path"}
CHECKPOINT_KEYS = ("sd_model_checkpoint",)


def check_settings(app: Application, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as the settings take them; what equals the present value is left as it is.

    Raises OptionError and UnknownCheckpointError; nothing is changed.
    """
    checked = {}
    for key, value in values.items():
        if key not in app.options.data_labels:
            raise OptionError(_unknown_key_message(app, key))
        if key in CHECKPOINT_KEYS and value:
            checked[key] = find_checkpoint(app, value).title
            continue
        cast = app.options.cast_value(key, value)
        if key in FOLDER_KEYS and cast != getattr(app.options, key, None):
            _check_folder(app, key, cast)
        checked[key] = cast
    return checked


def _unknown_key_message(app: Application, key: str) -> str:
    near = difflib.get_close_matches(str(key), list(app.options.data_labels), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else " GET /sdapi/v1/options lists them."
    return f"there is no setting {key!r}.{hint}"


def find_checkpoint(app: Application, name: Any) -> CheckpointInfo:
    """The checkpoint that `name` means; the folders are looked at again if need be. Raises UnknownCheckpointError, NoCheckpointError."""
    return app.checkpoints.require(name)


def _check_folder(app: Application, key: str, value: Any) -> None:
    """Without a password anyone who reaches the API could have files written anywhere; then only the data folder is open to it."""
    if not value or app.config.api_auth:
        return
    data_dir = app.config.data_dir.resolve()
    allowed = (data_dir, app.config.outputs_dir.resolve())
    folder = (data_dir / Path(str(value))).resolve()
    if not any(folder.is_relative_to(root) for root in allowed):
        raise OptionError(
            f"setting {key!r}: {str(value)[:200]!r} is outside {data_dir}. An API without a password (--api-auth) may not choose such folders; "
            "set it on the settings page."
        )
