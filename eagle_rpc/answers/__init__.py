"""Asking the target: batched generation, its cache, and files of regenerated chats."""
