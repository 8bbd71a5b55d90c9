"""One lock for the first imports of the network libraries.

transformers and diffusers create their names on first access. Two threads doing so at once can see a half-initialized package and fail with
"cannot import name ..." in correct code. Every thread that imports them holds this lock: startup, the job worker, the token counter.
"""

from __future__ import annotations

import threading

network_imports = threading.RLock()
