"""The name that extensions import: importing it gives `modules.pictures.postprocessing`, the very same module."""

from __future__ import annotations

import sys

from modules.pictures import postprocessing

sys.modules[__name__] = postprocessing
