"""The name that extensions import: importing it gives `modules.samplers.common`, the very same module."""

from __future__ import annotations

import sys

from modules.samplers import common

sys.modules[__name__] = common
