"""The name that extensions import: importing it gives `modules.pictures.own_files`, the very same module."""

from __future__ import annotations

import sys

from modules.pictures import own_files

sys.modules[__name__] = own_files
