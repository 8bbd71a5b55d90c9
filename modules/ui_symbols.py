"""The name that extensions import: importing it gives `modules.ui.symbols`, the very same module."""

from __future__ import annotations

import sys

from modules.ui import symbols

sys.modules[__name__] = symbols
