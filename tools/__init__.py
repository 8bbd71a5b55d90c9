"""Commands for developers: tests, measurements and generated documents. The product imports none of them.

Reading order: `test` and `check` with `development`, `suite_time`; `bench` with `benchmarking`, `measure` and `core_share` (one report of
`benchmarks/` each), `step_calls`, `cluster_simulation`, `compare_trees` and `compare_pictures` (two checkouts), `house_numbers`,
`unread_settings`; documents: `documents`, `bad_input`, `picture_modes`, `sampler_grid`, `sampler_report` with `sampler_references`; for users:
`convert_checkpoint`, `extension_trial`. Folders: `campaign/` (long attacks and faults), `cuda_checks/` (a real GPU), `demo_model/` (the checkpoint
that is included).

Example: `python tools/bench tiles_flux` sets up the environment as launch.py does, runs the variants of benchmarks/tiles_flux.py in turns, and
writes benchmarks/tiles_flux.md.
"""
