"""The name that extensions import: importing it gives `modules.ui.common`, the very same module."""

from __future__ import annotations

import sys

from modules.ui import common

sys.modules[__name__] = common
