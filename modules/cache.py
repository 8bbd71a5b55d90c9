"""The name that extensions import: importing it gives `modules.checkpoints.cache`, the very same module."""

from __future__ import annotations

import sys

from modules.checkpoints import cache

sys.modules[__name__] = cache
