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
