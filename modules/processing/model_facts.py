"""Facts about the loaded model that the steps of a job need. A model from an extension declares them under Forge's names; others have defaults.

Imports nothing; must not know requests.
"""

from __future__ import annotations

from typing import Any


def takes_distilled_guidance(model: Any) -> bool:
    """Whether the model's network takes the distilled CFG scale."""
    return bool(getattr(model, "use_distilled_cfg_scale", False))


def reads_size(model: Any) -> bool:
    """Whether conditions depend on the picture's size."""
    family = getattr(model, "family_facts", None)
    return bool(model.is_sdxl) if family is None else bool(family.reads_size)


def attends_jointly(model: Any) -> bool:
    """Whether text and picture share one attention, so that a text must not be repeated to fit another's length."""
    return bool(getattr(getattr(model, "family_facts", None), "attends_jointly", False))


def always_shifts_by_size(model: Any) -> bool:
    """Whether noise levels depend on the size of the picture unless a job asks for a shift."""
    return bool(getattr(getattr(model, "family_facts", None), "always_shifts_by_size", False))


def shift_of_size(model: Any, latent_rows: int, latent_columns: int, num_steps: int) -> float | None:
    """The shift of noise levels that a flow model's authors give a picture of this size; None for a model that has one for all."""
    family = getattr(model, "family_facts", None)
    if family is None or family.shift_of_tokens is None:
        return None
    cell = family.latent.cell
    return float(family.shift_of_tokens(-(-latent_rows // cell) * -(-latent_columns // cell), num_steps))


def shifts_its_table_alone_in_forge(model: Any) -> bool:
    """Whether Forge computes some schedules of this model without its shift."""
    return bool(getattr(getattr(model, "family_facts", None), "forge_shifts_table_alone", False))


def takes_control_picture(model: Any) -> bool:
    """Whether the network takes a picture of edges or depth as more channels."""
    return bool(getattr(model, "takes_control_picture", False))


def is_edit_model(model: Any) -> bool:
    """Whether the model was trained to edit reference pictures, as far as its file tells."""
    return bool(getattr(model, "is_edit_model", False))


def reads_pictures(model: Any) -> bool:
    """Whether the text encoder sees reference pictures."""
    return bool(getattr(getattr(model, "family_facts", None), "reads_pictures", False))


def most_references(model: Any) -> int:
    """How many reference pictures the network takes in addition to the picture it makes."""
    unet = getattr(getattr(model, "forge_objects", None), "unet", None)
    return int(getattr(unet, "most_references", 0))
