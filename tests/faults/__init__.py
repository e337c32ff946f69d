"""Real processes of the service under a seeded schedule of faults. `benchmarks/faults.py` is its command line."""
