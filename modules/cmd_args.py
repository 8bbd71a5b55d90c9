"""The name that extensions import: importing it gives `modules.launch.cmd_args`, the very same module."""

from __future__ import annotations

import sys

from modules.launch import cmd_args

sys.modules[__name__] = cmd_args
