"""The name that extensions import: importing it gives `modules.launch.start`, the very same module."""

from __future__ import annotations

import sys

from modules.launch import start

sys.modules[__name__] = start
