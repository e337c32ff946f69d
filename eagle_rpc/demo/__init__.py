"""The embedded prompts, so that a first run needs no data of the user."""
