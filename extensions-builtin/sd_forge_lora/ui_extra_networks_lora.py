"""Cards of LoRA files: a click adds `<lora:name:1>` and the activation text to the prompt, the negative text to the negative prompt."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import networks
from network import NetworkOnDisk, SdVersion
from ui_edit_user_metadata import LoraUserMetadataEditor

from modules import shared
from modules.ui_extra_networks import ExtraNetworksPage, quote_js

_FAMILY_OF_ENGINE = {"sd15": SdVersion.SD1, "sd20": SdVersion.SD2, "sd21_v": SdVersion.SD2, "sdxl": SdVersion.SDXL}


class ExtraNetworksPageLora(ExtraNetworksPage):
    """The files in the LoRA folders."""

    def __init__(self) -> None:
        super().__init__("Lora")

    def refresh(self) -> None:
        networks.list_available_networks()

    def create_item(self, name: str, index: int | None = None, enable_filter: bool = True) -> dict[str, Any] | None:
        one = networks.registry().by_name().get(name)
        if one is None:
            return None
        path = str(Path(one.filename).with_suffix(""))
        item: dict[str, Any] = {
            "name": name,
            "filename": one.filename,
            "shorthash": (one.known_hash or "")[:12],
            "preview": self.find_preview(path) or self.find_embedded_preview(path, name, one.metadata),
            "description": self.find_description(path),
            "search_terms": [self.search_terms_from_path(one.filename), one.alias, one.known_hash or ""],
            "local_preview": f"{path}.png",
            "metadata": one.metadata,
            "sort_keys": {"default": index, **self.get_sort_keys(one.filename)},
        }
        written = self.read_user_metadata(item)
        item["prompt"], item["negative_prompt"] = prompt_of(written_name(one), written), quote_js(str(written.get("negative text") or ""))
        version = written.get("sd version")
        version = version if version in SdVersion.__members__ and version != "Unknown" else one.sd_version.name
        item["sd_version_str"] = f"SdVersion.{version}"
        return None if enable_filter and is_of_another_family(SdVersion[version]) else item

    def list_items(self) -> Iterable[dict[str, Any]]:
        found = (self.create_item(name, index) for index, name in enumerate(networks.registry().by_name()))
        return [item for item in found if item is not None]

    def allowed_directories_for_previews(self) -> list[str]:
        return [str(folder) for folder in networks.registry().roots]

    def create_user_metadata_editor(self, ui: Any, tabname: str) -> LoraUserMetadataEditor:
        return LoraUserMetadataEditor(ui, tabname, self)


def written_name(one: NetworkOnDisk) -> str:
    """The name for this file in a prompt: its alias if the setting prefers it and it is unambiguous."""
    if shared.opts.lora_preferred_name != "Filename" and networks.registry().find(one.alias) is one:
        return one.alias
    return one.name


def prompt_of(name: str, written: dict[str, Any]) -> str:
    """What a click inserts, as a JavaScript expression: without a preferred weight, the setting's value at the time of the click."""
    weight = written.get("preferred weight")
    has_weight = isinstance(weight, (int, float)) and not isinstance(weight, bool) and weight != 0
    number = quote_js(f"{weight:g}") if has_weight else "opts.extra_networks_default_multiplier"
    activation = str(written.get("activation text") or "")
    return " + ".join([quote_js(f"<lora:{name}:"), number, quote_js(">"), *([quote_js(f" {activation}")] if activation else [])])


def is_of_another_family(version: SdVersion) -> bool:
    """Whether a file is known not to fit the current model, and such files are hidden."""
    if shared.opts.lora_filter_disabled or shared.sd_model is None or version is SdVersion.Unknown:
        return False
    return _FAMILY_OF_ENGINE.get(shared.sd_model.family, version) is not version
