"""Campaigns: attacks, odd files, faults and long runs against the whole program.

Each has a report under `benchmarks/` and a short form in the suite.
"""
