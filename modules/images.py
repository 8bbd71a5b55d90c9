"""The name that extensions import: importing it gives `modules.pictures.images`, the very same module."""

from __future__ import annotations

import sys

from modules.pictures import images

sys.modules[__name__] = images
