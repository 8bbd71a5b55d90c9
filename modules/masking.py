"""The name that extensions import: importing it gives `modules.pictures.masking`, the very same module."""

from __future__ import annotations

import sys

from modules.pictures import masking

sys.modules[__name__] = masking
