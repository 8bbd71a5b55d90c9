"""Requests as they lie in the store, from acceptance to their end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modules.cluster.orders import KINDS, describe_request, options_to_send
from modules.cluster.values import MessageError, pack, unpack
from modules.processing import StableDiffusionProcessing

if TYPE_CHECKING:
    from modules.application import Application


def pack_request(p: StableDiffusionProcessing, table: Mapping[str, Any]) -> bytes:
    """A request as it was accepted. Raises MessageError for one that cannot be written down."""
    kind = next((name for name, kind in KINDS.items() if type(p) is kind), None)
    if kind is None:
        raise MessageError(f"request: a {type(p).__name__} cannot be written down.")
    own = ("outpath_samples", "outpath_grids", "styles", "override_settings", "override_settings_restore_afterwards")
    fields = {**describe_request(p), **{name: getattr(p, name) for name in own}}
    runner = None if p.scripts is None else kind
    snapshot = options_to_send(p._options_when_made, table)
    return pack({"kind": kind, "fields": fields, "options": snapshot, "runner": runner, "script_args": tuple(p.script_args or ())})


def unpack_request(message: bytes, app: Application) -> StableDiffusionProcessing:
    """The request of pack_request, with the settings of then. Raises RequestError."""
    parts = unpack(message)
    try:
        kind, fields = KINDS[parts["kind"]], dict(parts["fields"])
        later = {name: fields.pop(name) for name in ("user", "is_api", "txt2img_upscale") if name in fields}
        known = {entry.name for entry in dataclasses.fields(kind) if entry.init}
        p = kind(**{name: value for name, value in fields.items() if name in known})
        p._options_when_made = app.options.snapshot().with_overrides(parts["options"])
        runner = app.script_runners.get(str(parts["runner"]))
        if runner is not None:
            p.scripts, p.script_args = runner, parts["script_args"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MessageError(f"what was written down cannot be read ({type(error).__name__}: {error})") from None
    for name, value in later.items():
        setattr(p, name, value)
    return p
