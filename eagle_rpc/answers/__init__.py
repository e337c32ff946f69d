"""Asking a target: batched generation and its caches."""
