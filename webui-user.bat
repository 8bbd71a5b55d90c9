@echo off
rem Settings, then startup. Flags as on the command line; "python launch.py --help" lists them.

set PYTHON=
set VENV_DIR=
set COMMANDLINE_ARGS=

call "%~dp0webui.bat" %*
