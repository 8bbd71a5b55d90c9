"""The name that extensions import: importing it gives `modules.ui.extensions`, the very same module."""

from __future__ import annotations

import sys

from modules.ui import extensions

sys.modules[__name__] = extensions
