"""The name that extensions import: importing it gives `modules.launch.script_loading`, the very same module."""

from __future__ import annotations

import sys

from modules.launch import script_loading

sys.modules[__name__] = script_loading
