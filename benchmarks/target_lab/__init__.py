"""The parts of `target.py`."""
