"""What `target.py` is made of."""
