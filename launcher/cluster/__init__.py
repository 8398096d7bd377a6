"""Slurm: batch scripts, submission, sweeps."""
