"""`python -m modules.cluster`: see modules.cluster.commands."""

from __future__ import annotations

import sys

from modules.cluster.commands import main

if __name__ == "__main__":
    sys.exit(main())
