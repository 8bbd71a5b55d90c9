"""LoRA as an extension: its extra network kind, settings, routes, cards, and file names in pasted prompts."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import gradio as gr
import lora  # noqa: F401 - other extensions look for it in sys.modules
import networks
from extra_networks_lora import ALIAS, NAME, ExtraNetworkLora
from infotext_lora import use_names_of
from lora_api import add_routes
from network import SHORT_HASH_DIGITS
from ui_extra_networks_lora import ExtraNetworksPageLora

from modules import extra_networks, script_callbacks, shared, ui_extra_networks
from modules.application import application_or_none, current_application
from modules.shared import OptionInfo

SECTION = ("extra_networks", "Extra Networks", "sd")


def register() -> None:
    """Register `<lora:...>` and `<lyco:...>` for the running application's folders."""
    app = current_application()
    networks.set_up(app.config.lora_dirs, app.hashes)
    network = ExtraNetworkLora()
    extra_networks.register_extra_network(network)
    extra_networks.register_extra_network_alias(network, ALIAS)


def unregister() -> None:
    """Unregister them: from then on, prompts that name them get a message."""
    extra_networks.extra_network_registry.pop(NAME, None)
    extra_networks.extra_network_aliases.pop(ALIAS, None)
    app = application_or_none()
    if app is not None and app.models.engine is not None:
        networks.remember(app.models.engine, [])


def add_settings() -> None:
    settings = {
        "sd_lora": OptionInfo("None", "Network to add to prompts", gr.Dropdown, lambda: {"choices": ["None", *networks.registry().list_names()]}),
        "lora_preferred_name": OptionInfo("Alias from file", "Name of a LoRA in prompts", gr.Radio, {"choices": ["Alias from file", "Filename"]}),
        "lora_add_hashes_to_infotext": OptionInfo(True, "Add hashes of LoRA files to the parameters"),
        "lora_filter_disabled": OptionInfo(True, "Show LoRA files of other model families too"),
        "lora_in_memory_limit": OptionInfo(0, "LoRA files kept in memory", gr.Number),
    }
    for key, info in settings.items():
        info.section, info.category_id = SECTION[:2], SECTION[2]
        shared.opts.add_option(key, info)


def use_names_of_own_files(_: str, params: MutableMapping[str, Any]) -> None:
    """In pasted prompts, rename `<lora:name:1>` to the local file with the same hash if its name differs."""
    files = networks.registry()

    def find_own_names(hashes: Mapping[str, str]) -> dict[str, str]:
        by_hash = {entry.known_hash[:SHORT_HASH_DIGITS]: entry for entry in reversed(list(files)) if entry.known_hash}
        own = {name: by_hash.get(shorthash.lower()[:SHORT_HASH_DIGITS]) for name, shorthash in hashes.items()}
        meant = {name: entry for name, entry in own.items() if entry is not None and (entry.known_hash or "").startswith(hashes[name].lower())}
        known = dict(zip(meant, files.find_all(list(meant))))
        return {name: entry.name for name, entry in meant.items() if known[name] is None}

    use_names_of(find_own_names, params)


register()
script_callbacks.on_ui_settings(add_settings)
script_callbacks.on_before_ui(lambda: ui_extra_networks.register_page(ExtraNetworksPageLora()))
script_callbacks.on_app_started(add_routes)
script_callbacks.on_infotext_pasted(use_names_of_own_files)
script_callbacks.on_script_unloaded(unregister)
