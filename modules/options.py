"""The name that extensions import: importing it gives `modules.settings.options`, the very same module."""

from __future__ import annotations

import sys

from modules.settings import options

sys.modules[__name__] = options
