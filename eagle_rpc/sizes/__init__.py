"""What targets, drafts, replies and devices measure, by formula. Importing it loads neither torch nor transformers."""
