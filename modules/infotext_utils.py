"""The name that extensions import: importing it gives `modules.infotext.parameters`, the very same module."""

from __future__ import annotations

import sys

from modules.infotext import parameters

sys.modules[__name__] = parameters
