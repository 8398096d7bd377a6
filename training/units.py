"""Units of memory, for training and launcher."""

GIB = 2**30
"""Bytes."""
