"""The parts of `many_gpus.py`."""
