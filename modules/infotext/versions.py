"""Restores the meaning of infotexts from older versions: settings whose default changed since.

Versions are A1111's ("v1.6.0", "v1.7.0-133-gde03882d") or Forge's, which appends the A1111 version it follows
("f2.0.1v1.10.1-previous-313"). Versions of other programs mean nothing here. Pure: modifies the dict in place.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import Any

_VERSION = re.compile(r"(?:f\d[\w.]*?)?v(\d{1,9})\.(\d{1,9})\.(\d{1,9})(?:-(?:RC\S*|(\d{1,9}))?)?", re.IGNORECASE)

Version = tuple[int, int, int, int]

PROMPT_TIMELINES_CHANGED: Version = (1, 6, 0, 0)
NOISE_TABLE_IN_FLOAT32: Version = (1, 7, 0, 225)
REFINER_SWITCHES_BY_TIMESTEP: Version = (1, 8, 0, 0)
FORGE_UNSHIFTED_SCHEDULES = ("Normal", "SGM Uniform", "Beta")
"""Forge computes these for Flux.1 without the model's shift."""


def parse_version(text: str | None) -> Version | None:
    """(major, minor, patch, commits since the tag) from a version string; None if it has another format."""
    match = _VERSION.match(text or "")
    if match is None:
        return None
    major, minor, patch, commits = match.groups()
    return int(major), int(minor), int(patch), int(commits or 0)


def backcompat(params: MutableMapping[str, Any]) -> None:
    """Add the settings that reproduce a picture of the version that `params` names. Does nothing without a known version."""
    if _wrote_forge(params) and "Distilled CFG Scale" in params and params.get("Schedule type") in FORGE_UNSHIFTED_SCHEDULES:
        params["Forge flow schedules"] = "True"
    version = parse_version(params.get("Version"))
    if version is None:
        return
    if version < PROMPT_TIMELINES_CHANGED and "[" in params.get("Prompt", ""):
        params["Old prompt editing timelines"] = "True"
    if version < PROMPT_TIMELINES_CHANGED and params.get("Sampler", "") in ("DDIM", "PLMS"):
        params["Pad conds v0"] = "True"
    if version < NOISE_TABLE_IN_FLOAT32:
        params["Downcast alphas_cumprod"] = "True"
    if version < REFINER_SWITCHES_BY_TIMESTEP and params.get("Refiner"):
        params["Refiner switch by sampling steps"] = "True"


def _wrote_forge(params: MutableMapping[str, Any]) -> bool:
    return re.match(r"f\d", str(params.get("Version", "")), re.IGNORECASE) is not None
