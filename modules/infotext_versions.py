"""The name that extensions import: importing it gives `modules.infotext.versions`, the very same module."""

from __future__ import annotations

import sys

from modules.infotext import versions

sys.modules[__name__] = versions
