"""One lock for the first imports of the network libraries.

transformers and diffusers make their names when they are first asked for. Two threads that do so at once can see a half-made package, and fail with
"cannot import name ..." in code that is right. Whoever imports them on a thread holds this lock: the start, the job worker, the token counter.
"""

from __future__ import annotations

import threading

network_imports = threading.RLock()
