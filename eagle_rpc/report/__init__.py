"""What a run tells people: figures, progress, log lines, plots."""
