"""Real decoding of prompts: by the target alone, with chains of guesses, and with trees of them."""
