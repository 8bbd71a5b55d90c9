"""What the steps of a job ask about the loaded model. An extension's own model answers by Forge's names; what it does not say has a default.

Imports nothing; must not know requests.
"""

from __future__ import annotations

from typing import Any


def takes_distilled_guidance(model: Any) -> bool:
    """Whether the model's network takes the distilled CFG scale."""
    return bool(getattr(model, "use_distilled_cfg_scale", False))


def reads_size(model: Any) -> bool:
    """Whether the picture's size is part of a condition."""
    family = getattr(model, "family_facts", None)
    return bool(model.is_sdxl) if family is None else bool(family.reads_size)
