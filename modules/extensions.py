"""The name that extensions import: importing it gives `modules.scripts.installed`, the very same module."""

from __future__ import annotations

import sys

from modules.scripts import installed

sys.modules[__name__] = installed
