"""Bytes from file to file: planned, copied, and published as a whole. Nothing here imports torch at module level."""
