"""The name that extensions import: importing it gives `modules.scripts.callbacks`, the very same module."""

from __future__ import annotations

import sys

from modules.scripts import callbacks

sys.modules[__name__] = callbacks
