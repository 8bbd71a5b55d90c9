"""The name that extensions import: importing it gives `modules.ui.toprow`, the very same module."""

from __future__ import annotations

import sys

from modules.ui import toprow

sys.modules[__name__] = toprow
