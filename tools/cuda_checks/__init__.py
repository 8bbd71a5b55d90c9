"""Checks that need a real GPU: `python -m tools.cuda_checks --out FOLDER`.

Reading order: `catalogue` (the checks), `runner` (each in a process with a time limit), `machine` and `networks` (what they are given), then the
checks: `memory_checks`, `speed_checks`, `slot_checks`, `tile_checks`, `patch_checks`, `picture_checks`, `profile_checks`.

Example: `slot_checks` uses one card as two slots, runs a UNet by layers twenty times, and compares each output bit by bit with the uncut
network's.
"""
