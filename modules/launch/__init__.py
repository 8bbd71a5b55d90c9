"""What runs before the program's packages are there: standard library only, and nothing here reads argv or the environment; `launch.py` hands
them in.

Reading order: `start` (`prepare`: all steps in one call), `cmd_args` (flags to an `AppConfig`), `venv`, `setup`, `pip` and `pins`
(packages), `stamp` (what was installed last time), `extensions` (their installers), `extension_folders`, `script_loading` and `guest_calls`
(files of extensions, imported and called), `port`, `env`, `timer`, `sysinfo`, `errors`. Beside them: `inert_flags`.

Example: `python launch.py --xformers` parses the flags, makes venv/ and goes on inside it, finds that requirements_versions.txt changed
since the stamp, calls pip once, runs the installers of extensions, and calls `webui.main(config)`. A new flag is an entry in `cmd_args` and
a field of modules/app_config.py.
"""
