"""The sections of the configuration, by subject. `schema.py` puts them together."""
