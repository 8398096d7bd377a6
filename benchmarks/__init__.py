"""Measurements against peers, and of our own promises; each file is a command."""
