#!/usr/bin/env bash
# Starts the WebUI with the settings of webui-user.sh. `python launch.py` does the same without them.
cd "$(dirname "$0")" || exit 1
[ -f webui-user.sh ] && . ./webui-user.sh
python=${PYTHON:-}
for name in python3.11 python3.12 python3.13 python3.10 python3 python; do
    [ -n "$python" ] && break
    command -v "$name" >/dev/null 2>&1 && python=$name
done
[ -n "$python" ] || { echo "ERROR: no Python was found. Install Python 3.10 to 3.13, or name one in webui-user.sh."; exit 1; }
exec "$python" launch.py "$@"
