"""Lists that settings and controls of extensions offer, under the names that they import."""

from __future__ import annotations

from typing import Any

from modules import scripts
from modules.checkpoints import models as sd_models
from modules.checkpoints import vae_files
from modules.jobs.context import required_context
from modules.samplers import registry

_BEFORE_AND_AFTER_VAES = ("Automatic", "None")


def postprocessing_scripts() -> list[Any]:
    """The operations of the Extras tab."""
    return list(scripts.scripts_postproc.scripts)


def sd_vae_items() -> list[str]:
    """ "Automatic", "None" and the VAE files."""
    return [*_BEFORE_AND_AFTER_VAES, *required_context().additional_modules.vaes]


def refresh_vae_list() -> None:
    """Look at the folders of VAE files again."""
    vae_files.refresh_vae_list()


def list_checkpoint_tiles(use_short: bool = False) -> list[str]:
    """Titles of the checkpoints."""
    return sd_models.checkpoint_tiles(use_short)


def refresh_checkpoints() -> None:
    """Look at the folders of checkpoints again."""
    sd_models.list_models()


def list_samplers() -> list[str]:
    """Names of the samplers that are shown."""
    return registry.visible_sampler_names()


def get_infotext_names() -> list[str]:
    """Keys of parameters that are settings, and those that scripts take care of."""
    labels = required_context().options.data_labels.values()
    runners = (scripts.scripts_txt2img, scripts.scripts_img2img)
    names = [*(info.infotext for info in labels if info.infotext), *(str(name) for runner in runners for name in runner.paste_field_names)]
    return list(dict.fromkeys(names))
