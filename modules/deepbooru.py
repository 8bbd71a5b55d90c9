"""What extensions import from A1111's tagger. The tagger itself is not part of this program."""

from __future__ import annotations

import re

re_special = re.compile(r"([\\()])")
"""Characters of a tag that need a backslash in a prompt."""
