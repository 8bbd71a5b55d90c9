# Settings for webui.sh, which reads this file before starting launch.py. Remove the # to use a line.

# Flags, as on the command line; `python launch.py --help` lists them.
#export COMMANDLINE_ARGS="--multi-gpu --api"

# The Python to use (3.10 to 3.13).
#export PYTHON="python3.11"

# Folder of the virtual environment; "-" for none.
#export VENV_DIR="venv"

# How to install torch. Without an NVIDIA GPU, use the smaller CPU package:
#export TORCH_INDEX_URL="https://download.pytorch.org/whl/cpu"
# For an AMD GPU on Linux, use the ROCm command from https://pytorch.org/get-started/locally/ with the version in requirements_versions.txt:
#export TORCH_COMMAND="pip install torch==2.13.0 --index-url ..."
