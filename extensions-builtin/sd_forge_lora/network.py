"""Descriptions of LoRA files and of LoRAs in use, for extensions and the page: names, hashes, families. Loads no tensors, knows no folders."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.checkpoints.listing import read_safetensors_metadata
from modules.hashes import HASHES_OF_NOTHING, HashStore

SHORT_HASH_DIGITS = 12
_LEFT_OUT_OF_METADATA = ("ssmd_cover_images",)
_HASH = re.compile("[0-9a-fA-F]{8,64}")
_PROMPT_NAME = re.compile(r"[^<>:,\x00-\x1f\x7f]{1,255}")
"""A name after `<lora:`."""


class SdVersion(enum.Enum):
    """Families as named in user metadata and on the page."""

    Unknown = 1
    SD1 = 2
    SD2 = 3
    SDXL = 4


def version_in_metadata(metadata: Mapping[str, Any]) -> SdVersion:
    """The family recorded in the file by its trainer."""
    base = str(metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture") or "").lower()
    if base.startswith(("sdxl", "stable-diffusion-xl")):
        return SdVersion.SDXL
    if base.startswith(("sd_v1", "stable-diffusion-v1")):
        return SdVersion.SD1
    if base.startswith(("sd_v2", "stable-diffusion-v2")) or str(metadata.get("ss_v2")) == "True":
        return SdVersion.SD2
    return SdVersion.Unknown


class NetworkOnDisk:
    """A LoRA file and its names."""

    def __init__(self, path: Path, store: HashStore) -> None:
        self._store = store
        self.path = path
        self.filename = str(path)
        self.name = path.stem
        self.is_safetensors = path.suffix.lower() == ".safetensors"
        self.stamp = stamp_of(path)
        metadata = read_safetensors_metadata(path)
        self.metadata: dict[str, Any] = {key: value for key, value in metadata.items() if key not in _LEFT_OUT_OF_METADATA}
        self.sd_version = version_in_metadata(metadata)

    @property
    def alias(self) -> str:
        """The name given by its trainer, or the file name."""
        written = str(self.metadata.get("ss_output_name") or "")
        return written if _PROMPT_NAME.fullmatch(written) else self.name

    @property
    def hash(self) -> str:
        """The tensor hash written by trainers and infotexts; computed on first use, "" with --no-hashing."""
        make = self._store.addnet_sha256 if self.is_safetensors else self._store.sha256
        return self._written_hash() or make(self.path, self._hash_title) or ""

    @property
    def known_hash(self) -> str | None:
        """The same hash if it is already known."""
        known = self._store.known_addnet_sha256 if self.is_safetensors else self._store.known_sha256
        return self._written_hash() or known(self.path, self._hash_title)

    def _written_hash(self) -> str | None:
        written = self.metadata.get("sshs_model_hash")
        return written.lower() if isinstance(written, str) and _HASH.fullmatch(written) and written.lower() not in HASHES_OF_NOTHING else None

    @property
    def _hash_title(self) -> str:
        return f"lora/{self.name}"

    @property
    def shorthash(self) -> str:
        return self.hash[:SHORT_HASH_DIGITS]

    def __repr__(self) -> str:
        return f"NetworkOnDisk({self.filename!r})"


def stamp_of(path: Path) -> tuple[int, int]:
    """A value that changes when the file does."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@dataclass(eq=False)
class Network:
    """A LoRA used by the job: its file, its strengths, and its patches by weight name."""

    name: str
    network_on_disk: NetworkOnDisk
    te_multiplier: float = 1.0
    unet_multiplier: float = 1.0
    dyn_dim: int | None = None
    modules: dict[str, Any] = field(default_factory=dict)
    mentioned_name: str | None = None
