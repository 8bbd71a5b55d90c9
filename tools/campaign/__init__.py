"""Campaigns: attacks, malformed files, faults and long runs against the whole program.

Each has a report under `benchmarks/` and a short version in the test suite.
"""
