# Settings for webui.sh, which reads this file before it starts launch.py. Take the # off a line to use it.

# Flags, as on the command line; `python launch.py --help` lists them.
#export COMMANDLINE_ARGS="--multi-gpu --api"

# The Python to begin with (3.10 to 3.13).
#export PYTHON="python3.11"

# Where the virtual environment lies; "-" for none.
#export VENV_DIR="venv"

# What installs torch. For a machine without an NVIDIA GPU, the smaller package for the CPU:
#export TORCH_INDEX_URL="https://download.pytorch.org/whl/cpu"
# For an AMD GPU on Linux, the command that https://pytorch.org/get-started/locally/ gives for ROCm, with the version of requirements_versions.txt:
#export TORCH_COMMAND="pip install torch==2.13.0 --index-url ..."
