"""Fault tests: a running service under a seeded schedule of faults. `python -m tests.faults --help` says
more.

`kinds.py` lists the faults.
"""
