"""Settings sent by a client, for one request or permanently: checks keys, values, checkpoints and folders."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modules.checkpoints.listing import CheckpointInfo
from modules.errors import OptionError

if TYPE_CHECKING:
    from modules.application import Application

CHECKPOINT_KEYS = ("sd_model_checkpoint",)
MODULE_KEYS = ("forge_additional_modules", "sd_vae")
"""A name that is not there would make every later job fail."""


def check_settings(app: Application, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` converted for the settings; a value equal to the current one is left as it is.

    Raises OptionError, UnknownCheckpointError and UnknownModuleError; nothing is changed.
    """
    checked = {}
    for key, value in values.items():
        if key not in app.options.data_labels:
            raise OptionError(_unknown_key_message(app, key))
        if key in CHECKPOINT_KEYS and value:
            checked[key] = find_checkpoint(app, value).title
            continue
        cast = app.options.cast_value(key, value)
        if cast != app.options.data.get(key):
            _check_change(app, key, cast)
            if key in MODULE_KEYS:
                app.additional_modules.chosen_by({key: cast})
        checked[key] = cast
    return checked


def _unknown_key_message(app: Application, key: str) -> str:
    near = difflib.get_close_matches(str(key), list(app.options.data_labels), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else " GET /sdapi/v1/options lists them."
    return f"there is no setting {key!r}.{hint}"


def find_checkpoint(app: Application, name: Any) -> CheckpointInfo:
    """The checkpoint meant by `name`; rescans the folders if needed. Raises UnknownCheckpointError, NoCheckpointError."""
    return app.checkpoints.require(name)


def _check_change(app: Application, key: str, value: Any) -> None:
    """Without a password, anyone who reaches the API could write files anywhere, so only the output folders are allowed then."""
    info = app.options.data_labels[key]
    if info.restrict_api:
        raise OptionError(f"setting {key!r} cannot be changed through the API; set it on the settings page.")
    app.folders.check_from_client(key, info, value, is_trusted=bool(app.config.api_auth))
