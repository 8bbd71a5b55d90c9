"""The name that extensions import: importing it gives `modules.ui.components`, the very same module."""

from __future__ import annotations

import sys

from modules.ui import components

sys.modules[__name__] = components
