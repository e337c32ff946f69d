"""Figures of a run for people: metrics, progress, plots, the status of a service."""
