"""The name that extensions import: importing it gives `modules.samplers.schedules`, the very same module."""

from __future__ import annotations

import sys

from modules.samplers import schedules

sys.modules[__name__] = schedules
