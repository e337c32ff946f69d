"""The embedded model and prompts, with which a first run needs nothing of the user."""
