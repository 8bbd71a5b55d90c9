"""Which model files a request needs, so that a worker can look for them and the front can send them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from modules.cluster.orders import FileName
from modules.processing import StableDiffusionProcessing

_NETWORK = re.compile(r"<(?:lora|lyco):([^:>]{1,200})[:>]")


def find_files(p: StableDiffusionProcessing) -> tuple[list[FileName], dict[str, Path]]:
    """The model files of a request, the checkpoint first, and where those with a hash are here. Raises RequestError."""
    context = p.context
    request = context.models.resolve(p.options)
    others = [context.checkpoints.find(name) if name else None for name in (p.refiner_checkpoint, getattr(p, "hr_checkpoint_name", None))]
    checkpoints = dict.fromkeys([request.checkpoint, *(info for info in others if info is not None)])
    named = [("checkpoint", info.path, info.name) for info in checkpoints]
    named += [("module", path, path.name) for path in request.additional_modules]
    named += [("network", path, path.name) for path in find_networks(p.all_prompts, context.config.lora_dirs)]
    files, sources = [], {}
    for kind, path, title in named:
        sha256 = context.hashes.sha256(path, f"{kind}/{title}")
        files.append(FileName(kind=kind, name=path.name, size_bytes=path.stat().st_size, sha256=sha256))
        if sha256 is not None:
            sources[sha256] = path
    return files, sources


def find_networks(prompts: Sequence[str], folders: Sequence[Path]) -> list[Path]:
    """The LoRA files that prompts name and that are here; a name that is not known is left to the worker, which tells the user."""
    names = {name.strip() for prompt in prompts for name in _NETWORK.findall(prompt)}
    if not names:
        return []
    files = [path for folder in folders for path in sorted(folder.rglob("*.safetensors")) if path.stem in names]
    return list({path.stem: path for path in reversed(files)}.values())


def model_key_of(files: Sequence[FileName], p: StableDiffusionProcessing) -> str:
    """Equal for requests that the same loaded model serves."""
    parts = [file.sha256 or f"{file.name}:{file.size_bytes}" for file in files if file.kind != "network"]
    return hashlib.sha256("|".join([*parts, str(p.options.forge_unet_storage_dtype)]).encode()).hexdigest()[:16]
