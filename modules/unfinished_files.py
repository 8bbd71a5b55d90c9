"""The name that extensions import: importing it gives `modules.pictures.unfinished_files`, the very same module."""

from __future__ import annotations

import sys

from modules.pictures import unfinished_files

sys.modules[__name__] = unfinished_files
