"""The name that extensions import: importing it gives `modules.ui.settings`, the very same module."""

from __future__ import annotations

import sys

from modules.ui import settings

sys.modules[__name__] = settings
