"""The name that extensions import: importing it gives `modules.launch.timer`, the very same module."""

from __future__ import annotations

import sys

from modules.launch import timer

sys.modules[__name__] = timer
