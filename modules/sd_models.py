"""The name that extensions import: importing it gives `modules.checkpoints.models`, the very same module."""

from __future__ import annotations

import sys

from modules.checkpoints import models

sys.modules[__name__] = models
