"""Everything that runs before the program's packages are installed. Uses only the standard library; argv and the environment are passed in by
`launch.py`, never read here.

Reading order: `start` (`prepare`: all steps in one call), `cmd_args` (flags to an `AppConfig`), `venv`, `setup`, `pip` and `pins`
(packages), `stamp` (what was installed last time), `extensions` (their installers), `extension_folders`, `script_loading` and `guest_calls`
(files of call files of extensions), `port`, `env`, `devices` (prepares the engine), `timer`, `sysinfo`, `version`, `errors`, `inert_flags`.

Example: `python launch.py --xformers` parses the flags, creates venv/ and continues inside it, sees that requirements_versions.txt changed
since the stamp, calls pip once, runs the installers of extensions, and calls `webui.main(config)`. A new flag needs an entry in `cmd_args` and
a field of modules/app_config.py.
"""
