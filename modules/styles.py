"""The name that extensions import: importing it gives `modules.prompts.styles`, the very same module."""

from __future__ import annotations

import sys

from modules.prompts import styles

sys.modules[__name__] = styles
