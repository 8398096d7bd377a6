"""Checkpoints, resumption, stops, and what to do about hangs and full memory."""
