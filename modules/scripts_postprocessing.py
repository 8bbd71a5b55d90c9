"""The name that extensions import: importing it gives `modules.scripts.postprocessing`, the very same module."""

from __future__ import annotations

import sys

from modules.scripts import postprocessing

sys.modules[__name__] = postprocessing
