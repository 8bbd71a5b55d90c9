"""`<lora:name:te:unet>` in prompts: applies the named files to the job's clones of the model, so they are gone after the job.

Weights are patched when the model is loaded onto a device, on every slot. What cannot be used is reported next to the pictures, which are made
without it. Importing this file is cheap; what needs torch is imported when a prompt names a LoRA.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networks
from infotext_lora import HASHES_KEY
from network import Network, NetworkOnDisk

from modules.extra_networks import ExtraNetwork, ExtraNetworkParams
from modules.nearest_names import say_nearest

log = logging.getLogger(__name__)

NAME = "lora"
ALIAS = "lyco"
_ONLINE_MARK = "(fp16 LoRA)"
MAX_MENTIONS = 128
"""Each is a further pass over the model's patches."""
_MAX_EXPLAINED = 3
"""Number of missing names to give suggestions for; a prompt may have thousands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraMention:
    """One mention in a prompt: the name as written, and its strengths for the text encoders and the UNet."""

    name: str
    te_multiplier: float
    unet_multiplier: float
    notices: tuple[str, ...] = ()


def parse_mention(params: ExtraNetworkParams) -> LoraMention:
    """`name[:te[:unet[:dyn]]]`, or te=, unet=, dyn= by name. te defaults to 1, unet to te."""
    notices: list[str] = []
    name = params.positional[0] if params.positional else params.named.get("name", "")
    written = [*params.positional[1:], None, None, None]
    te = _number(params.named.get("te", written[0]), 1.0, name, notices)
    unet = _number(params.named.get("unet", written[1]), te, name, notices)
    if params.named.get("dyn", written[2]) not in (None, ""):
        notices.append(f"<lora:{name}>: dyn has no effect; the whole LoRA is applied.")
    return LoraMention(name=name, te_multiplier=te, unet_multiplier=unet, notices=tuple(notices))


def _number(text: str | None, default: float, name: str, notices: list[str]) -> float:
    if text is None or not text.strip():
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value - value != 0:  # accepts infinity, rejects NaN
        notices.append(f"<lora:{name}>: {text!r} is not a multiplier; {default:g} is used.")
        return default
    return value


def _suggest(missing: Sequence[str]) -> str:
    """Suggestions for the first few missing names."""
    known = networks.registry().list_names()
    return "".join(f"; for {name[:100]!r}, {say_nearest(name, known)}" for name in missing[:_MAX_EXPLAINED])


class ExtraNetworkLora(ExtraNetwork):
    """The kind "lora". Keeps the files in use, plus recent ones up to the setting `lora_in_memory_limit`."""

    def __init__(self) -> None:
        super().__init__(NAME)

    def activate(self, p: Any, params_list: list[ExtraNetworkParams]) -> None:
        mentions = [parse_mention(params) for params in [*params_list, *self._chosen_in_settings(p, params_list)]]
        for notice in (notice for mention in mentions for notice in mention.notices):
            p.comment(notice)
        if len(mentions) > MAX_MENTIONS:
            p.comment(f"The prompt names {len(mentions)} networks; the first {MAX_MENTIONS} are put on the model, the others are left out.")
            del mentions[MAX_MENTIONS:]
        found = list(zip(mentions, networks.registry().find_all([mention.name for mention in mentions])))
        missing = [mention.name for mention, entry in found if entry is None]
        if missing:
            p.comment(f"Networks not found: {', '.join(missing)}{_suggest(missing)}")
        networks.patch_sets.forget_other_models(p.sd_model)
        used = [network for mention, entry in found if entry is not None and (network := self._apply(p, mention, entry)) is not None]
        networks.patch_sets.forget_unused(used, int(p.options.lora_in_memory_limit))
        networks.remember(p.sd_model, used)
        for reason in networks.use_bundled_embeddings(p.sd_model, used):
            p.comment(reason)
        _write_hashes(p, used)

    def deactivate(self, p: Any) -> None:
        """Nothing to undo: the next job starts from the unpatched model."""

    def _chosen_in_settings(self, p: Any, params_list: Sequence[ExtraNetworkParams]) -> list[ExtraNetworkParams]:
        """Add the network from the setting `sd_lora` unless the prompt already names it."""
        name = p.options.sd_lora
        if not name or name == "None" or any(params.positional[:1] == [name] for params in params_list):
            return []
        return [ExtraNetworkParams([name, str(p.options.extra_networks_default_multiplier)])]

    def _apply(self, p: Any, mention: LoraMention, entry: NetworkOnDisk) -> Network | None:
        """Apply one file to the job's clones; None, with a comment, if it cannot be used."""
        from backend.patcher.lora_files import LoraError  # torch

        network = Network(entry.name, entry, mention.te_multiplier, mention.unet_multiplier, mentioned_name=mention.name)
        try:
            patch_set = networks.keep_modules(network, networks.patch_sets.read(p.sd_model, entry))
        except LoraError as error:
            p.comment(str(error))
            return None
        networks.add_network(p.sd_model, network, patch_set, online=_wants_online(p))
        return network


def _wants_online(p: Any) -> bool:
    """Whether the UNet's stored weights stay unchanged: they have lower precision than the computation, and the setting says "(fp16 LoRA)"."""
    return str(p.options.forge_unet_storage_dtype).endswith(_ONLINE_MARK) and p.sd_model.forge_objects.unet.model.is_compact


def _write_hashes(p: Any, used: Sequence[Network]) -> None:
    """`Lora hashes: "name: 0123456789ab, ..."` for the infotext, combined over both passes."""
    hashes = {}
    if p.options.lora_add_hashes_to_infotext:
        names = [(str(one.mentioned_name).replace(":", "").replace(",", ""), one.network_on_disk.shorthash) for one in used]
        hashes = {name: shorthash for name, shorthash in names if shorthash}
    entries = [f"{name}: {digest}" for name, digest in hashes.items()]
    if getattr(p, "is_hr_pass", False) and (earlier := p.extra_generation_params.get(HASHES_KEY)):
        entries = list(dict.fromkeys([*earlier.split(", "), *entries]))
    if entries:
        p.extra_generation_params[HASHES_KEY] = ", ".join(entries)
    else:
        p.extra_generation_params.pop(HASHES_KEY, None)
