"""Campaigns: attacks, malformed files, faults and long runs against the whole program. Each has a report under `benchmarks/` and a short version
in the test suite.

Reading order: `full_server` and `forked` (the program as a process), `guided_job` (the job that is disturbed), `reporting` and `progress`; faults:
`memory_faults`, `interrupts`, `kills`, `disk_full`, `soak`, `clients`, `cluster`; hostile input: `file_fuzz` with `network_files`,
`parser_growth`, `security_sweep` with `security_server` and `security_pages`.

Example: `python -m tools.campaign.kills` starts the program a hundred times, kills it while a picture is saved, and looks for half-written files.
"""
