"""Checkpoints, resume, requested stops, hangs, and out of memory."""
