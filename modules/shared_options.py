"""The name that extensions import: importing it gives `modules.settings.table`, the very same module."""

from __future__ import annotations

import sys

from modules.settings import table

sys.modules[__name__] = table
