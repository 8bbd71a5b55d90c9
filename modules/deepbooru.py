"""What extensions import from the tagger of old programs. The tagger itself is not part of this program."""

from __future__ import annotations

import re

re_special = re.compile(r"([\\()])")
"""Characters of a tag that a prompt needs a backslash before."""
