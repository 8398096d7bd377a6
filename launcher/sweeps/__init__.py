"""Sweeps: many trainings of one recipe with other values, one after the other here or as a job array on Slurm."""
